"""Heads that travel with adapters.

Decides whether an adapter has a head of its own, and builds it from the adapter's tensors, with what it lacks (a pooler)
taken from the base's checkpoint. Knows nothing of low-rank updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorax_core.adapters.base import fits_dtype, known
from lorax_core.adapters.deltas import cast_to
from lorax_core.adapters.formats.peft import PeftFiles
from lorax_core.errors import AdapterError, listed
from lorax_core.modeling.config import MAX_LABELS, ModelConfig, Problem
from lorax_core.modeling.heads import CLASSIFICATION, Head
from lorax_core.modeling.linear import prepare_linears
from lorax_core.modeling.site import Site
from lorax_core.plugins.resolve import load_class
from lorax_core.types import Task
from lorax_core.weights.loader import LoadedModel


@dataclass(frozen=True)
class HeadRequest:
    """What the user states of an adapter's head, where its files do not."""

    task: Task | None = None
    problem: Problem | None = None
    id2label: Mapping[int, str] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, task: str | None, problem_type: str | None, id2label: Mapping[int, str] | None) -> HeadRequest:
        """A request from a user's words; raises AdapterError for a word that is none."""
        labels = None
        if id2label is not None:
            try:  # JSON has text for keys
                labels = {int(index): str(name) for index, name in id2label.items()}
            except (TypeError, ValueError, AttributeError) as error:
                raise AdapterError(
                    f"id2label maps numbers to names; this is {id2label!r:.80}", hint='such as {0: "no", 1: "yes"}'
                ) from error
        return cls(
            Task(known("task", task, Task)) if task is not None else None,
            Problem(known("problem_type", problem_type, Problem)) if problem_type is not None else None,
            labels,
        )

    @property
    def settings(self) -> tuple[object, ...]:
        """What changes the adapter's effect."""
        labels = sorted(self.id2label.items()) if self.id2label is not None else None
        return (self.task, self.problem, labels)


def build_head(
    files: PeftFiles, wanted: HeadRequest, task: Task | None, base: LoadedModel, device: torch.device
) -> tuple[Head | None, frozenset[str]]:
    """The adapter's own head on `device`, None when it has none; and the modules of the files that it is made of.

    Raises AdapterError when a head is there but not for which task, or the base lacks what it needs.
    """
    candidates = _head_tensors(files, base)
    if wanted.task is not None and files.settings.task in CLASSIFICATION and files.settings.task is not wanted.task:
        raise AdapterError(
            f"{files.path} says that it is for {files.settings.task.value!r}, not for {wanted.task.value!r}",
            hint="leave task out: the adapter's files say it",
        )
    # Tensors beyond the backbone could be of any head; a wrong task would give plausible nonsense.
    strange = [module for module in candidates if module not in base.model.sites and not base.holds(module)]
    if task is None and strange and not any(module in base.model.sites for module in candidates):
        raise AdapterError(
            f"{files.path} has a head ({listed(candidates)}) and does not say for which task",
            hint="adapters.load(..., task='token-classification') or 'sequence-classification'",
            http_hint="POST /v1/adapters takes the task: 'token-classification' or 'sequence-classification'",
        )
    # Generating and embedding use the base's head; what is saved for it is changed like any layer.
    if task not in CLASSIFICATION or not candidates:
        if wanted.id2label is not None or wanted.problem is not None:
            raise AdapterError(
                f"{files.path} has no head of its own, so id2label and problem_type do not apply",
                hint="leave them out: the base's config.json names the labels",
            )
        return None, frozenset()
    if task not in base.spec.tasks:
        raise AdapterError(
            f"{files.path} is for {task.value!r}, for which {base.spec.model_type!r} has no head",
            hint="load it on a base with such a head; `lorax models list` shows the tasks of each architecture",
        )
    kind = cast("type[Head]", load_class(base.spec.head(task), base.owner))
    own = {f"{module}.{leaf}": tensor for module, leafs in candidates.items() for leaf, tensor in leafs.items()}
    below = _below(base)
    names = {*own, *below}
    labels = _labels(files, wanted, own, _output(kind, base.model.config, names, task))
    head = _built(kind, base.model.config, names, task, labels, wanted.problem)
    if head is None:
        lacking = [name for name in getattr(kind, "needed", ()) if name not in names]
        raise AdapterError(
            f"{files.path} holds {listed(sorted(own))}, but a head for {task.value!r} needs more than it and the base have"
            + (f": {listed(lacking)}" if lacking else ""),
            hint="train it with its whole head in modules_to_save, or load it on the base that it was trained on",
        )
    used = {name for name, _ in head.named_parameters()}
    # One by one: of the base's tensors, which may be merged when they are read, a head needs few.
    tensors = {name: own[name] if name in own else _arranged(base, below[name]) for name in used & names}
    _fill(head, tensors, files, device, base.model.dtype)
    modules = {base.weight_map.canonical(module): module for module in files.modules}
    layers = {name.rpartition(".")[0] for name in used}
    # The backbone takes the modules that the head does not use, or an error names them.
    return head, frozenset(modules[module] for module in candidates if module in layers)


def _built(
    kind: type[Head],
    config: ModelConfig,
    names: Set[str],
    task: Task,
    labels: Mapping[int, str] | None,
    problem: Problem | None = None,
) -> Head | None:
    """A head without numbers, for these labels; the configuration's own when None."""
    changes = {"id2label": dict(labels), "problem_type": problem} if labels is not None else {}
    # Heads are built for their names and shapes; numbers come from the files.
    with torch.device("meta"):
        return kind.build(config.model_copy(update=changes), names, task)


def _output(kind: type[Head], config: ModelConfig, names: Set[str], task: Task) -> str | None:
    """The head's weight that has a row for each label: the one whose shape follows their number."""
    shapes: list[dict[str, torch.Size]] = []
    # Two numbers of labels that differ: the weight whose shape differs with them is the one.
    for count in (2, 3):
        head = _built(kind, config, names, task, dict.fromkeys(range(count), ""))
        shapes.append({name: tensor.shape for name, tensor in head.named_parameters()} if head is not None else {})
    two, three = shapes
    return next((name for name in two if len(two[name]) == 2 and two[name] != three[name]), None)


def _labels(
    files: PeftFiles, wanted: HeadRequest, own: Mapping[str, Tensor], output: str | None
) -> Mapping[int, str] | None:
    """Names of the rows of the adapter's last layer; None when that layer is the base's, and so the labels.

    That both have equally many labels does not make them the same, so the base's names are never taken for the adapter's.
    """
    if output is None or output not in own:
        if output is not None and (wanted.id2label is not None or wanted.problem is not None):
            raise AdapterError(
                f"{files.path} has no {output!r} of its own, so id2label and problem_type do not apply",
                hint="leave them out: the base's config.json names the labels",
            )
        return None
    count = own[output].shape[0]
    if count > MAX_LABELS:
        raise AdapterError(
            f"{files.path}: {output!r} has {count:,} labels; at most {MAX_LABELS:,} are read",
            hint="copy or download it again",
        )
    if wanted.id2label is not None and sorted(wanted.id2label) != list(range(count)):
        raise AdapterError(
            f"{files.path} has {count} labels; id2label names {sorted(wanted.id2label)}",
            hint=f"name the labels 0 to {count - 1}, each once",
        )
    return wanted.id2label or {index: f"LABEL_{index}" for index in range(count)}


def _head_tensors(files: PeftFiles, base: LoadedModel) -> dict[str, dict[str, Tensor]]:
    """Saved modules that are no part of the backbone, by canonical name."""
    backbone = {path for path, _ in base.model.backbone.named_modules()}
    found: dict[str, dict[str, Tensor]] = {}
    for module, tensors in files.modules.items():
        target = base.weight_map.resolve_module(module)
        saved = dict(tensors.items())
        own = target.name not in backbone and not target.name.startswith("lm_head")
        if saved and saved.keys() <= {"weight", "bias"} and own:
            if target.name in found:
                raise AdapterError(
                    f"{files.path} changes {module!r} twice, under two spellings",
                    hint="keep the tensors of one spelling; PEFT's save_pretrained writes each once",
                )
            found[target.name] = saved
    return found


def _below(base: LoadedModel) -> dict[str, str]:
    """The tensors of the base's checkpoint that no part of the backbone takes: canonical names to those in the files."""
    backbone = {path for path, _ in base.model.backbone.named_modules()}
    names = ((base.weight_map.resolve(name).name, name) for name in base.checkpoint.tensors)
    return {target: name for target, name in names if target.rpartition(".")[0] not in backbone}


def _arranged(base: LoadedModel, name: str) -> Tensor:
    return base.weight_map.resolve(name).arranged(base.checkpoint.tensor(name))


def _fill(
    head: Head, tensors: Mapping[str, Tensor], files: PeftFiles, device: torch.device, dtype: torch.dtype
) -> None:
    for path, module in head.named_modules():
        if isinstance(module, Site):
            module.path = path
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            tensor = tensors.get(full)
            if tensor is None:
                raise AdapterError(
                    f"{files.path} and its base lack {full!r}, which the head needs",
                    hint="train it with its whole head in modules_to_save, or load it on the base that it was trained on",
                )
            if tensor.shape != parameter.shape:
                raise AdapterError(
                    f"{files.path}: {full!r} has shape {list(tensor.shape)}, the head asks for {list(parameter.shape)}",
                    hint="load it on the base that it was trained on; base_model_name_or_path in adapter_config.json names it",
                )
            with fits_dtype(f"{files.path}: {full!r}"):
                setattr(module, name, nn.Parameter(cast_to(tensor, device, dtype), requires_grad=False))
    # Packing reads numbers, which a check has none of.
    if device.type != "meta":
        prepare_linears(head)
    head.eval()
