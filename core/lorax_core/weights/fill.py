"""The numbers of a checkpoint to their places in a model.

Decides in which order tensors are read and through which memory. Each weight is in memory once, also one
that has a layout of its own for computing. Knows nothing of architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from lorax_core.errors import CapacityError, CheckpointError, PluginError
from lorax_core.linear_methods.select import LinearPolicy
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.linear import LinearPreparer
from lorax_core.modeling.model import Model
from lorax_core.progress import Progress, Report, silent
from lorax_core.weights.account import Account, Placement
from lorax_core.weights.bounds import as_config_error, refuse_large_buffers
from lorax_core.weights.checkpoint import Checkpoint, is_finite
from lorax_core.weights.mapping import Target

_LARGE: Final = 16
"""A weight of more than one such part of the model is prepared before others, while there is room for a copy."""

Pieces = Sequence[tuple[str, Target]]
"""The tensors of one parameter, by their names in the files."""
Reader = Callable[[str], Tensor]


def fill(
    model: Model, checkpoint: Checkpoint, placement: Placement, policy: LinearPolicy | None, report: Report = silent
) -> None:
    """Give the model its numbers and, with a policy, prepare its linear layers; what is not finite comes into the account.

    Where the account has problems before, or from then on, numbers are only looked at.
    """
    read, account = checkpoint.reader(), placement.account
    pieces: dict[str, list[tuple[str, Target]]] = {}
    for name, place in placement.places.items():
        if place.scale is None:
            pieces.setdefault(place.target.name, []).append((name, place.target))
        else:
            _note(account, name, _set_scale(*place.scale, float(read(name))))
    if account.problems:
        _look(read, (one for many in pieces.values() for one in many), model.dtype, account)
        return
    refuse_large_buffers(checkpoint, model)
    holders = _share(model, placement)
    _make_buffers(model, checkpoint)
    preparer = LinearPreparer(model, policy) if policy is not None else None
    parameters = model.named_tensors()
    memory = _Memory(model, sum(parameters[name].numel() for name in pieces))
    sizes = {name: sum(checkpoint.tensors[piece].nbytes for piece, _ in many) for name, many in pieces.items()}
    done, total = 0, sum(sizes.values())
    for name in _ordered(pieces, parameters, preparer):
        report(Progress("reading weights", done, total, "B"))
        done += sizes[name]
        if account.problems:
            _look(read, pieces[name], model.dtype, account)
            continue
        parameter = parameters[name]
        lent = preparer is not None and preparer.copies(parameter, model.dtype, model.device)
        try:
            weight = _read(model, read, pieces[name], parameter.shape, memory, lent, account)
        except CheckpointError as error:
            if isinstance(error.__cause__, MemoryError):  # a file is mapped, for which there may be no room
                raise memory.refusal(error.__cause__) from error
            raise
        if account.problems:
            continue
        if preparer is not None and preparer.takes(parameter):
            try:
                preparer.prepare(parameter, weight, lent=lent)
            except MemoryError as error:
                raise memory.refusal(error) from error
        else:
            made = nn.Parameter(weight, requires_grad=False)
            for module, attribute in holders[name]:
                setattr(module, attribute, made)
    report(Progress("reading weights", done, total, "B"))
    if preparer is not None:
        model.linears = preparer.report


def _share(model: Model, placement: Placement) -> dict[str, list[tuple[nn.Module, str]]]:
    """Make parameters of one name one, still on `meta`, and say which modules hold each.

    Where `config.json` states no task, two heads may read the same tensors. Those of a tie are one, too, so that one prepared
    weight serves both.
    """
    holders: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_parts():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            # No prefix keeps heads apart in `named_parts`, so a name that two of them have leads to one parameter.
            name = f"{path}.{attribute}" if path else attribute
            same = holders.setdefault(placement.ties.get(name, name), [])
            first = getattr(*same[0]) if same else parameter
            setattr(module, attribute, first)
            same.append((module, attribute))
    return holders


def _make_buffers(model: Model, checkpoint: Checkpoint) -> None:
    """Recompute buffers, which a module makes from its own arguments."""
    for _, module in model.named_parts():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # The default would be a buffer left on `meta`, which fails at the first step only, with torch's own message.
            reset = getattr(module, "reset_buffers", None)
            if reset is None:
                raise PluginError(
                    f"{type(module).__name__} has buffers but no reset_buffers(device) to make them",
                    hint="give the module that method; it makes its buffers again on the device",
                )
            with as_config_error(checkpoint):
                reset(model.device)


def _ordered(
    pieces: dict[str, list[tuple[str, Target]]], parameters: dict[str, nn.Parameter], preparer: LinearPreparer | None
) -> list[str]:
    """The order of parameters: as the files have them, but for two exceptions."""
    if preparer is None:
        return list(pieces)
    share = sum(parameters[name].numel() for name in pieces) / _LARGE

    def rank(name: str) -> int:
        parameter = parameters[name]
        if not preparer.takes(parameter):
            return 0  # first, as a prepared layer takes its bias with it
        # Then large ones: the memory that such a weight is read into is free again when the others need it.
        return -parameter.numel() if parameter.numel() > share else 1

    return sorted(pieces, key=lambda name: (rank(name) != 0, rank(name)))


class _Memory:
    """Where weights are read into."""

    def __init__(self, model: Model, numbers: int) -> None:
        self._dtype, self._device = model.dtype, model.device
        self._numbers, self._total = numbers, numbers * model.dtype.itemsize
        self._lent: Tensor | None = None

    def lasting(self, shape: torch.Size) -> Tensor:
        """Memory of a parameter."""
        try:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        except RuntimeError as error:  # torch's for memory that there is not, on any device
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> CapacityError:
        """That there is no memory for the weights."""
        return CapacityError(
            f"the weights take {self._total / 1e9:.1f} GB as {str(self._dtype).removeprefix('torch.')}, more than there "
            f"is on {str(self._device)!r}: {error}",
            hint="use a machine with more memory, or dtype='bfloat16'",
        )

    def lent(self, shape: torch.Size) -> Tensor:
        """Memory that the next weight takes, too: new memory takes longer to get than the numbers to be written."""
        count = shape.numel()
        # A large one is given back; a smaller one is kept through all layers, as the heap would be left in pieces.
        if self._lent is None or not count <= self._lent.numel() <= max(count, self._numbers // _LARGE):
            self._lent = None  # before the new one, so that there are not two
            self._lent = self.lasting(torch.Size([count]))
        return self._lent[:count].view(shape)


def _read(
    model: Model, read: Reader, pieces: Pieces, shape: torch.Size, memory: _Memory, lent: bool, account: Account
) -> Tensor:
    """The numbers of a parameter; where memory is `lent`, they may lie in that or still in the file."""
    weight: Tensor | None = None
    for name, target in pieces:
        stored = target.arranged(read(name))
        if lent and target.part is None and stored.dtype is model.dtype and stored.is_contiguous():
            _note(account, name, _problem(stored, stored, model.dtype))
            return stored
        if weight is None:
            weight = memory.lent(shape) if lent else memory.lasting(shape)
        rows = _rows(model, weight, target).copy_(stored)
        _note(account, name, _problem(stored, rows, model.dtype))
    assert weight is not None
    return weight


def _rows(model: Model, weight: Tensor, target: Target) -> Tensor:
    """Where the numbers of a target go: a parameter, or the rows of one member in the fused [sum(parts), in]."""
    if target.part is None:
        return weight
    parts = model.sites[target.name.rpartition(".")[0]].parts
    start = sum(parts[: target.part])
    return weight[start : start + parts[target.part]]


def _look(read: Reader, pieces: Iterable[tuple[str, Target]], dtype: torch.dtype, account: Account) -> None:
    """Whether numbers are finite, without memory for them."""
    for name, _ in pieces:
        stored = read(name)
        _note(account, name, _problem(stored, stored.to(dtype), dtype))


def _note(account: Account, name: str, misfit: str | None) -> None:
    if misfit:
        account.misfits.append(f"{name!r} {misfit}")


def _set_scale(layer: Attention, attribute: str, scale: float) -> str | None:
    setattr(layer, attribute, scale)
    # Numbers are divided by it on their way into the cache.
    return None if math.isfinite(scale) and scale > 0 else f"is {scale}; a scale is a number above 0"


def _problem(stored: Tensor, cast: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with the numbers of a tensor, `cast` to the dtype in which they are computed with."""
    # A single NaN would make every answer NaN without any error. Looked for after the cast, which may make numbers infinite; a
    # widening one does not, and the narrow ones are read faster.
    if is_finite(stored if stored.itemsize < cast.itemsize else cast):
        return None
    if not is_finite(stored):
        return "holds NaN or infinite numbers"
    most = float(stored.abs().max())
    wider = [name for name in ("float32", "bfloat16") if most <= torch.finfo(getattr(torch, name)).max]
    advice = f"load it with dtype={' or '.join(map(repr, wider))}" if wider else "no dtype that is supported holds them"
    return f"holds numbers up to {most:.3g}, which become infinite in {str(dtype).removeprefix('torch.')}: {advice}"
