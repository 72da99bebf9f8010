"""Every tensor of a checkpoint is accounted for, and a damaged checkpoint is refused by the name of what is wrong.

Decides which damages a checkpoint is given, each written to files of its own. Knows nothing of numbers.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorax_core.errors import listed
from lorax_core.testing.case import BASE, Case
from lorax_core.testing.check import Check
from lorax_core.testing.result import CheckFailed, Measured
from lorax_core.types import Task
from lorax_core.weights.account import Account
from lorax_core.weights.loader import LoadedModel

Tensors = dict[str, Tensor]
_FILE = "model.safetensors"


def _accounted(case: Case) -> Measured:
    summary = []
    for task in case.tasks:
        account = case.account(task)
        if account.problems:
            raise CheckFailed(f"a whole checkpoint for {task!s} is refused: {'; '.join(account.problems)}")
        base = case.loaded(task)
        if base.default_task is not task:
            name = case.reference(task).config.architectures[0]
            raise CheckFailed(
                f"a checkpoint of {name} is taken for {base.default_task!s}, not {task!s}; name it in hf_architectures"
            )
        summary.append(f"{task}: {account.filled} filled, {len(account.ignored)} ignored")
    return Measured(note="; ".join(summary))


def _missing(case: Case) -> Measured:
    """Half of the backbone's tensors are taken out, in so many ways that any two are parted: every one must be named.

    Parted, because a tensor that is missing must not be made up from any other. Variants other than the base are cut in two
    once.
    """
    count = 0
    for task in case.chosen:
        tensors, base = _read(case, task), case.loaded(task)
        needed = _taken(case, task, tensors)
        for half in list(_halves(needed))[: None if case.variant == BASE else 2]:
            account = _damaged(case, task, {name: tensor for name, tensor in tensors.items() if name not in half})
            _insist("missing", [name for name in half if _spelt(base, name) not in account.missing])
        count += len(needed)
    return Measured(note=f"{count} tensors taken out, each named")


def _halves(names: Sequence[str]) -> Iterator[set[str]]:
    """Sets of names such that of any two names each is once in a set without the other."""
    # By the bits of their places: log2(n) cuts instead of one load for each tensor.
    for bit in range(max(1, (len(names) - 1).bit_length())):
        for side in (0, 1):
            yield {name for at, name in enumerate(names) if at >> bit & 1 == side}


def _corrupt(case: Case) -> Measured:
    """NaN in some tensors, another shape in others."""
    count = 0
    for task in case.chosen:
        tensors = _read(case, task)
        for turn in range(2):
            # A scalar has no row to repeat.
            bad = [name for name in _taken(case, task, tensors) if tensors[name].ndim]
            spoilt = {name: _spoil(tensors[name], at % 2 == turn) for at, name in enumerate(bad)}
            misfits = _damaged(case, task, {**tensors, **spoilt}).misfits
            _insist("corrupt", [name for name in bad if not any(f"'{name}'" in line for line in misfits)])
            count += len(bad)
    return Measured(note=f"{count} tensors spoilt, each named")


def _extra(case: Case) -> Measured:
    """Biases where there are none, a layer too many, and a name from nowhere."""
    count = 0
    for task in case.chosen:
        tensors = _read(case, task)
        more = _extra_tensors(tensors, case.account(task).ignored)
        unused = _damaged(case, task, {**tensors, **more}).unused
        _insist("extra", [name for name in more if name not in unused])
        count += len(more)
    return Measured(note=f"{count} tensors added, each named")


def _spoil(tensor: Tensor, shape: bool) -> Tensor:
    if shape:
        return torch.cat((tensor, tensor[:1]))
    spoilt = tensor.clone()
    # The last number, so that a look at the first few does not find it.
    spoilt.view(-1)[-1] = float("nan")
    return spoilt


def _extra_tensors(tensors: Mapping[str, Tensor], ignored: Iterable[str]) -> Tensors:
    ignored = set(ignored)
    known = {name for name in tensors if name not in ignored}
    more = {"kit.unknown.weight": torch.zeros(2, 2)}
    for name in known:
        # A bias that nothing takes is how a wrong `bias=False` shows.
        if name.endswith(".weight"):
            more[name.removesuffix("weight") + "bias"] = torch.zeros(tensors[name].shape[:1])
    numbers = [int(number) for name in known for number in re.findall(r"\.(\d+)\.", name)]
    last, beyond = f".{max(numbers, default=0)}.", f".{max(numbers, default=0) + 1}."
    more |= {name.replace(last, beyond): tensors[name].clone() for name in known if last in name}
    return {name: tensor for name, tensor in more.items() if name not in tensors}


def _taken(case: Case, task: Task, tensors: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a checkpoint that fill parameters of the backbone: without one of a head's, there is no head."""
    base = case.loaded(task)
    backbone = {name for name, _ in base.model.backbone.named_parameters()}
    # A packed layer has given its weight away; its sites still stand for it.
    backbone |= {f"{path}.weight" for path, _ in base.model.backbone.named_modules() if path in base.model.sites}
    return [name for name in tensors if base.weight_map.resolve(name).name in backbone]


def _spelt(base: LoadedModel, name: str) -> str:
    """A tensor under the name by which the loader calls it missing."""
    target = base.weight_map.resolve(name)
    module, _, leaf = target.name.rpartition(".")
    stored = target.name if target.part is None else f"{base.weight_map.members(module)[target.part]}.{leaf}"
    return base.weight_map.stored_name(stored)


def _read(case: Case, task: Task) -> Tensors:
    # Tiny checkpoints are one file.
    tensors: Tensors = load_file(case.checkpoint(task) / _FILE)
    return tensors


def _damaged(case: Case, task: Task, tensors: Tensors) -> Account:
    """The account of a copy of the checkpoint that holds these tensors."""
    with tempfile.TemporaryDirectory(dir=case.folder) as name:
        folder = Path(name)
        shutil.copy(case.checkpoint(task) / "config.json", folder)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / _FILE)
        return case.assemble(folder)[1]


def _insist(damage: str, silent: Sequence[str]) -> None:
    if silent:
        raise CheckFailed(f"{damage} in the checkpoint, and loading does not say so: {listed(silent)}")


CHECKS = (
    Check(
        "weights-accounted",
        "every tensor of a whole checkpoint is loaded, and its task is recognised",
        _accounted,
        sized=False,
    ),
    Check("weights-missing", "a tensor that is missing is named", _missing, sized=False),
    Check("weights-corrupt", "a tensor with NaN or of another shape is named", _corrupt, sized=False),
    Check("weights-extra", "a tensor that nothing takes is named", _extra, sized=False),
)
