"""What TEI's API takes and answers, as `/openapi.json` describes it.

Decides the shapes alone. Knows nothing of requests to the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import Response
from pydantic import ConfigDict, Field

from lorax_core.server.schemas import AnswerShape, StrictBody, failures, unsupported
from lorax_core.serving.requests import NAME_LENGTH

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Rows = TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
"""Token ids of a text, or of several."""
Inputs = str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]
"""A text or its token ids, or a list of those."""
Parts = Annotated[list[str], Field(min_length=1, max_length=2)]
PredictInputs = str | Parts | Annotated[list[Parts], Field(min_length=1)]
"""A text, a pair of texts, or a list of lists of one or two texts."""
Direction = Literal["left", "right", "Left", "Right"]


_Model = Annotated[
    str | None,
    Field(
        max_length=NAME_LENGTH,
        description="The base, an adapter, or base:adapter; TEI, which serves one model, has no such field.",
    ),
]
_PromptName = Annotated[str | None, Field(description="Of a prompt that the checkpoint's files have.")]


class Cutting(StrictBody):
    """What happens to a text that is too long."""

    truncate: bool | None = Field(default=None, description="Cut it; False refuses it.")
    truncation_direction: Direction = Field(default="right", description="The end that loses tokens.")

    @property
    def cut(self) -> Literal["error", "start", "end"]:
        """The same as the engine says it."""
        if not self.truncate:
            return "error"
        return "start" if self.truncation_direction.lower() == "left" else "end"


class Truncating(Cutting):
    """The same, and which model answers."""

    model: _Model = None


class EmbedBody(Truncating):
    """Texts for vectors."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"inputs": ["a text", "another"], "truncate": True}]})

    inputs: Inputs
    normalize: bool = True
    prompt_name: _PromptName = None
    dimensions: int | None = Field(
        default=None, ge=1, lt=2**31, description="The first so many numbers of each vector."
    )
    encoding_format: Any = unsupported("float", instead="/v1/embeddings has base64")


class EmbedAllBody(Truncating):
    """Texts for a vector of each token."""

    inputs: Inputs
    prompt_name: _PromptName = None


class ComparedTexts(StrictBody):
    """A sentence, and others that it is compared with."""

    source_sentence: str
    sentences: list[str] = Field(min_length=1)


class SimilarityParameters(Cutting):
    """How the sentences are read."""

    prompt_name: _PromptName = None


class SimilarityBody(StrictBody):
    """Sentences to compare."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": {"source_sentence": "a text", "sentences": ["one", "another"]}}]}
    )

    model: _Model = None
    inputs: ComparedTexts
    parameters: SimilarityParameters | None = None


class PredictParameters(StrictBody):
    """What `InferenceClient` sends, and TEI does not read."""

    top_k: Any = unsupported(instead="the answer has all labels, by falling score")
    function_to_apply: Any = unsupported(instead="raw_scores gives logits")


class PredictBody(Truncating):
    """Texts, or pairs of texts, for their labels."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"inputs": "a text"}, {"inputs": [["one"], ["a", "pair"]]}]}
    )

    inputs: PredictInputs
    raw_scores: bool = Field(default=False, description="Logits instead of probabilities.")
    parameters: PredictParameters | None = None


class RankBody(Truncating):
    """A query, and texts that may answer it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a question", "texts": ["one", "another"]}]})

    query: str
    texts: list[str] = Field(min_length=1)
    raw_scores: bool = Field(default=False, description="Logits instead of their sigmoid.")
    return_text: bool = False


class TokenizeTexts(StrictBody):
    """Texts."""

    model: _Model = None
    inputs: str | Annotated[list[str], Field(min_length=1)]
    add_special_tokens: bool = True
    prompt_name: Any = unsupported(instead="put the prompt before the text")


class DecodeBody(StrictBody):
    """Token ids."""

    model: _Model = None
    ids: Rows
    skip_special_tokens: Any = unsupported(True, instead="/tei/tokenize shows special tokens")


class TeiFailure(AnswerShape):
    """The answer to a request that failed; `hint` says what to do next."""

    error: str
    error_type: str
    hint: str | None = None


class Prediction(AnswerShape):
    """A label, and how sure it is."""

    score: float
    label: str


class Rank(AnswerShape):
    """A text by its place among those given; `text` where it was asked for."""

    index: int
    score: float
    text: str | None = None


class TeiToken(AnswerShape):
    """A token, and the characters that it covers; special ones cover none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


class Labels(AnswerShape):
    """The labels of a classifier or reranker."""

    id2label: dict[str, str]
    label2id: dict[str, int]


class Pooled(AnswerShape):
    """How an embedding is made of the rows of its tokens."""

    pooling: str


class ModelType(AnswerShape):
    """What the model does, one of these."""

    embedding: Pooled | None = None
    classifier: Labels | None = None
    reranker: Labels | None = None


class TeiInfo(AnswerShape):
    """What is served. Numbers of TEI's own batching that mean nothing here are 0."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_type: ModelType
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int | None
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    sha: str | None
    docker_label: str | None


def answers(shape: Any) -> dict[str, Any]:
    """Options of a route that answers `shape`."""
    # Of an answer without a model FastAPI would say that it is JSON.
    empty = {"response_class": Response} if shape is None else {}
    return {"response_model": shape, "response_model_exclude_none": True, "responses": {**_FAILURES}, **empty}


_FAILURES: Final[dict[int | str, dict[str, Any]]] = failures(TeiFailure, lambda kind: kind.tei_status)
