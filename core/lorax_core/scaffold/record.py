"""What every module of a model was given and what it gave, in the order of their calls.

Decides how tensors are kept: as rows `[tokens, ...]`, the batch of one taken off. Knows nothing of what modules are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorax_core.scaffold.tiny import quiet

CLOSE = 2e-5
"""How far apart two tensors may be that are the same but for rounding, as a share of the largest number."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: its name, the tensors that it was given and those that it gave."""

    name: str
    module: nn.Module
    given: tuple[Tensor, ...]
    made: tuple[Tensor, ...]

    @property
    def x(self) -> Tensor:
        """The first tensor that it was given, as rows."""
        return rows(self.given[0])

    @property
    def y(self) -> Tensor:
        """The first tensor that it gave, as rows."""
        return rows(self.made[0])


@dataclass
class Record:
    """One pass of a model over tokens `[1, tokens]`."""

    model: nn.Module
    ids: Tensor
    calls: list[ModuleCall] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    logits: Tensor | None = None

    def below(self, prefix: str) -> list[ModuleCall]:
        """The calls of modules inside of one."""
        return [call for call in self.calls if call.name.startswith(f"{prefix}.")]

    def of(self, name: str) -> ModuleCall | None:
        """The first call of a module."""
        return next((call for call in self.calls if call.name == name), None)


@torch.inference_mode()
def observe(model: nn.Module, ids: Tensor, **more: Tensor) -> Record:
    """A pass with every module watched. `more` are other inputs that the model takes."""
    record = Record(model, ids)
    names = {module: name for name, module in model.named_modules()}

    def watch(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        last = getattr(output, "last_hidden_state", None)
        if isinstance(last, Tensor):
            # Of the base model, or of its decoder where a head calls that one alone (OPT).
            record.hidden = last[0].clone()
        given = _tensors([*args, *kwargs.values()])
        made = _tensors(output if isinstance(output, tuple | list) else [output])
        if given and made:
            record.calls.append(ModuleCall(names[module], module, given, made))

    hooks = [module.register_forward_hook(watch, with_kwargs=True) for module in names]
    try:
        with quiet():
            # No cache: some classes make one of layers that they do not have.
            answer = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more)
    finally:
        for hook in hooks:
            hook.remove()
    logits = getattr(answer, "logits", None)
    record.logits = None if logits is None else logits[0].clone()
    return record


def rows(x: Tensor) -> Tensor:
    """A tensor `[1, tokens, ...]` without its batch."""
    return x[0] if x.ndim > 2 and x.shape[0] == 1 else x


def same(one: Tensor, other: Tensor, close: float = CLOSE) -> bool:
    """Whether two tensors are equal but for rounding."""
    if one.shape != other.shape or not torch.isfinite(one).all():
        return False
    if not one.numel():
        return True
    return bool((one - other).abs().max() <= close * max(float(one.abs().max()), 1e-12))


def _tensors(values: Sequence[Any]) -> tuple[Tensor, ...]:
    # Cloned: what comes later may write into them.
    return tuple(value.clone() for value in values if isinstance(value, Tensor) and value.is_floating_point())
