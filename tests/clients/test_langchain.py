"""LangChain's embeddings class for OpenAI's API, as it is published, against a server on loopback."""

from __future__ import annotations

import numpy as np


def test_its_vectors_are_those_of_the_engine(client, url, qwen2):
    said = client(url, "langchain", texts=["a text", "another"])

    assert "error" not in said, said
    np.testing.assert_allclose(said["found"], qwen2.embed(["a text", "another", "a text"]), rtol=1e-4, atol=1e-5)
