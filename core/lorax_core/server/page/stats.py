"""What a server is, can and does now, in one answer.

Decides which adapter is offered for which task. Knows nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorax_core.adapters.residency.handle import AdapterInfo
from lorax_core.modeling.heads import CLASSIFICATION
from lorax_core.server.gateway import Gateway
from lorax_core.server.schemas import AnswerShape
from lorax_core.serving.info import EngineInfo
from lorax_core.types import Task


class AdapterState(AnswerShape):
    """A loaded adapter; `can` is what it is of use for, `where` is "device", "memory" or "disk"."""

    name: str
    kind: str
    task: str | None
    can: list[str]
    nbytes: int
    where: str


class ServerState(AnswerShape):
    """What a server is, can and does now.

    `can` is what its base does without adapters, of "generate", "embed", "labels", "entities" and "rerank". Tokens and seconds
    are sums since its start; pages are those of the KV cache.
    """

    model: str
    model_type: str
    dtype: str
    device: str
    can: list[str]
    chat: bool
    max_tokens: int
    running: int
    waiting: int
    pages_used: int
    pages: int
    prompt_tokens: int
    decode_tokens: int
    step_seconds: float
    adapters: list[AdapterState]


def state(gateway: Gateway) -> dict[str, Any]:
    """The numbers of `ServerState`."""
    info = gateway.engine.info()
    step, totals = info.last_step, info.totals
    return {
        "model": gateway.names.base,
        "model_type": info.model_type,
        "dtype": info.dtype,
        "device": info.device,
        "can": base_can(info),
        "chat": Task.GENERATE in info.tasks and info.chat_template,
        "max_tokens": info.max_tokens,
        "running": step.running if step is not None else 0,
        "waiting": step.waiting if step is not None else 0,
        "pages_used": step.pages_used if step is not None else 0,
        "pages": step.pages if step is not None else 0,
        "prompt_tokens": totals.prompt_tokens,
        "decode_tokens": totals.decode_tokens,
        "step_seconds": totals.seconds,
        "adapters": [
            {"name": one.name, "kind": one.kind, "task": one.task, "can": adapter_can(info, one)}
            | {"nbytes": one.nbytes, "where": one.where}
            for one in gateway.engine.adapters.list()
        ],
    }


def base_can(info: EngineInfo) -> list[str]:
    """What the base does without an adapter."""
    plain = [task.value for task in (Task.GENERATE, Task.EMBED) if task in info.tasks]
    head = next((task for task in CLASSIFICATION if task in info.tasks), None)
    return plain + ([] if head is None else _classifies(head, info.labels))


def adapter_can(info: EngineInfo, adapter: AdapterInfo) -> list[str]:
    """What an adapter is of use for: the task that it was trained for, or whatever the base does where none is known."""
    base = base_can(info)
    if adapter.task in CLASSIFICATION:
        return _classifies(Task(adapter.task), adapter.labels or info.labels)
    if adapter.task is None:
        return base
    return [task for task in base if task == adapter.task or task == Task.EMBED]


def _classifies(head: Task, labels: Sequence[str]) -> list[str]:
    if head is Task.TOKEN_CLASSIFICATION:
        return ["entities"]
    return ["labels", "rerank"] if len(labels) == 1 else ["labels"]
