"""What TEI's `/info` says of an engine.

Decides which of TEI's kinds of model an engine is. Knows nothing of routes.
"""

from __future__ import annotations

from typing import Any, Literal

from lorax_core.server.gateway import Gateway
from lorax_core.serving.info import EngineInfo
from lorax_core.types import Task
from lorax_core.version import __version__


def served(gateway: Gateway) -> dict[str, Any]:
    """The answer of `/info`."""
    engine = gateway.engine
    about, options = engine.info(), engine.options
    return {
        "model_id": gateway.names.base,
        "model_sha": options.revision,
        "model_dtype": about.dtype,
        "model_type": _model_type(about),
        "max_concurrent_requests": options.max_batch_rows + gateway.options.max_queue,
        "max_input_length": about.max_text_tokens,
        "max_batch_tokens": options.max_batch_tokens,
        "max_batch_requests": options.max_batch_rows,
        "max_client_batch_size": gateway.options.max_batch,
        "auto_truncate": False,
        "tokenization_workers": 0,
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def model_kind(about: EngineInfo) -> Literal["reranker", "classifier", "embedding"] | None:
    """What the base was trained for: a head with labels comes before the vectors that any model gives."""
    if about.labels:
        ranks = Task.SEQUENCE_CLASSIFICATION.value in about.tasks and len(about.labels) == 1
        return "reranker" if ranks else "classifier"
    return None if about.pooling is None else "embedding"


def _model_type(about: EngineInfo) -> dict[str, Any]:
    kind = model_kind(about)
    if kind in ("reranker", "classifier"):
        ids = {str(at): label for at, label in enumerate(about.labels)}
        return {kind: {"id2label": ids, "label2id": {label: int(at) for at, label in ids.items()}}}
    return {} if kind is None else {kind: {"pooling": about.pooling}}
