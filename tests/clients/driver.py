"""Calls clients of other projects; run by the Python of the environment that has them.

Reads one call a line of stdin, as JSON (url, method, arguments, whether asynchronous), and writes what came of it as a line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any


def plain(value: Any) -> Any:
    """What a client gave, as JSON has it."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return json.loads(value.model_dump_json())


def call(url: str, method: str, arguments: dict[str, Any]) -> Any:
    """What the client gives."""
    from lorax import Client

    found = getattr(Client(url, timeout=60), method)(**arguments)
    return plain(list(found) if method == "generate_stream" else found)


async def call_async(url: str, method: str, arguments: dict[str, Any]) -> Any:
    """What the asynchronous client gives."""
    from lorax import AsyncClient

    found = getattr(AsyncClient(url, timeout=60), method)(**arguments)
    if method == "generate_stream":
        return plain([one async for one in found])
    return plain(await found)


def langchain(url: str, texts: list[str]) -> list[list[float]]:
    """The vectors that LangChain's embeddings of OpenAI give."""
    from langchain_openai import OpenAIEmbeddings

    # Else it sends the token ids of OpenAI's own models.
    embeddings = OpenAIEmbeddings(model="base", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    return [*embeddings.embed_documents(texts), embeddings.embed_query(texts[0])]


def fields() -> dict[str, list[str]]:
    """The fields of all that the client can send."""
    from lorax.types import BatchRequest, MergedAdapters, Parameters, Request

    return {kind.__name__: list(kind.model_fields) for kind in (BatchRequest, MergedAdapters, Parameters, Request)}


def main() -> None:
    """Answers until stdin ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if asked["method"] == "fields":
                found = fields()
            elif asked["method"] == "langchain":
                found = langchain(asked["url"], **asked["arguments"])
            elif asked.pop("asynchronous"):
                found = asyncio.run(call_async(**asked))
            else:
                found = call(**asked)
            said = {"found": found}
        except Exception as error:
            said = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
