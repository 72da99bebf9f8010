"""Whether a checkpoint can be served, without serving it.

Decides what `lorax models check` reports. Fills a model as loading does, but reports what does not fit
instead of raising an error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorax_core.plugins.host import PluginHost
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import assemble, stored_dtype


@dataclass(frozen=True)
class CheckReport:
    """What a checkpoint holds. `ok` is true when every tensor found its place and every place its tensor.

    `verdict` is `ok`, `cannot be loaded`, or `incomplete`: it loads without the head of the class that it names.
    """

    ok: bool
    verdict: str
    path: str
    model_type: str
    tasks: list[str]
    tensors: int
    parameters: int
    dtype: str
    problems: list[str]
    ignored: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_checkpoint(path: str | Path, host: PluginHost) -> CheckReport:
    """Account for a checkpoint folder; raises as loading does when it cannot even be read or has no plugin."""
    checkpoint = Checkpoint(path)
    # On the CPU whatever the machine has, and without `prepare_linears`: the report is about files, not about devices.
    loaded, account = assemble(checkpoint, host, None, "cpu")
    # By identity, so that tied weights count once.
    parameters = {id(tensor): tensor.numel() for tensor in loaded.model.named_tensors().values()}
    lacking = list(loaded.model.lacking.values())
    return CheckReport(
        ok=not account.problems and not lacking,
        verdict="cannot be loaded" if account.problems else "incomplete" if lacking else "ok",
        path=str(path),
        model_type=loaded.spec.model_type,
        tasks=[task.value for task in loaded.model.tasks],
        tensors=len(checkpoint.tensors),
        parameters=sum(parameters.values()),
        dtype=str(stored_dtype(checkpoint)).removeprefix("torch."),
        problems=[*account.problems, *lacking],
        ignored=account.ignored,
    )
