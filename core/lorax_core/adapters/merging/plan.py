"""One adapter in the weights of its base: which tensor of the files becomes what.

Decides the place of each part of an adapter in a checkpoint, and what a tensor is with the adapter in it, in the orientation of
the files and in float32; what is done to a layer is decided in `formats.layer`. All places are found before any number is
changed. Who writes or computes with the tensors is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from lorax_core.adapters.formats.head import HeadRequest, build_head
from lorax_core.adapters.formats.layer import Layer, layer_deltas, share_tie, share_tokens
from lorax_core.adapters.formats.lora import check_saved
from lorax_core.adapters.formats.medusa import is_medusa
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles, read_peft
from lorax_core.adapters.formats.vocabulary import (
    added_rows,
    holds_rows,
    larger_tables,
    refuse_missing_rows,
    vocabulary_tables,
)
from lorax_core.errors import AdapterError, listed, nearest
from lorax_core.modeling.heads import CLASSIFICATION, Head, SequenceClassificationHead, TokenClassificationHead
from lorax_core.plugins.host import PluginHost
from lorax_core.types import Task
from lorax_core.weights.checkpoint import FLOATS, Checkpoint, StoredTensor
from lorax_core.weights.loader import LoadedModel, stated_task, unfilled
from lorax_core.weights.mapping import WeightMap

_NOTHING: Final = ModuleTensors()
Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class _ModuleChange:
    """What becomes of the weight or bias (`leaf`) of a module.

    `weight` and `bias` are the base's in the files (None: it has none); without both, what the adapter holds stands alone.
    """

    module: str
    tensors: ModuleTensors
    leaf: str
    weight: str | None
    bias: str | None

    @property
    def embeddings(self) -> int:
        """How many rows a table of embeddings has for this to be of one; 0 when it is of none, or that cannot be seen."""
        if self.tensors.embedding_a is not None:
            return self.tensors.embedding_a.shape[1]
        return len(self.tensors.weight) if self.tensors.weight is not None else 0


@dataclass
class MergePlan:
    """Which tensor of a checkpoint changes how; `config` is its `config.json` with the adapter merged.

    `beside` has the tensors that are new, each to the one in whose file it goes. `notes` are for the user. With `rounded` sums
    will be brought to the dtype of their file, which decides whether the two sides of a tie still are one weight.
    """

    checkpoint: Checkpoint
    files: PeftFiles
    weight_map: WeightMap
    config: dict[str, Any]
    rounded: bool
    vocabulary: int
    added: int  # tokens that the adapter has beyond the vocabulary
    changes: dict[str, _ModuleChange] = field(default_factory=dict)  # by name in the files
    beside: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, files: PeftFiles, host: PluginHost, *, rounded: bool) -> MergePlan:
        """The plan; raises AdapterError for a part of the adapter that has no place."""
        base = unfilled(checkpoint, host)
        size, added = base.model.config.vocab_size, added_rows(files, base)
        plan = cls(checkpoint, files, base.weight_map, dict(checkpoint.config), rounded, size, added)
        stored = {plan._place(name): name for name in checkpoint.tensors}
        # Before any row is made: an id may be any number.
        refuse_missing_rows(files, base, larger_tables(files, base), size + added)
        head, taken = None, frozenset[str]()
        task = files.settings.task
        if task in CLASSIFICATION:
            head, taken = build_head(files, HeadRequest(), task, base, torch.device("meta"))
        check_saved(files, head, base)
        tied = plan._take_modules(base, stored, taken)
        for above, below in plan._ties(base).items():
            plan._tie(below, above, stored, tied)
        plan._check_vocabulary(base, stored)
        plan._check_shapes()
        plan._note_unsupported()
        if head is not None and task is not None:
            plan._state_head(base, task, head)
        else:
            plan._note_labels(base)
        return plan

    @property
    def headers(self) -> dict[str, StoredTensor]:
        """What the files hold with the adapter in them; tensors that change are in float32."""
        made = dict(self.checkpoint.tensors)
        for name, change in self.changes.items():
            old = change.weight if change.leaf == "weight" else change.bias
            shape = self._shape(change, old) if old is not None else tuple(getattr(change.tensors, change.leaf).shape)
            made[name] = StoredTensor(made[self.beside.get(name, name)].file, shape, "F32")
        return made

    def tensor(self, name: str, read: Reader) -> Tensor:
        """A tensor that changes, with the adapter in it, in float32; `read` gives those of the files."""
        change = self.changes[name]
        if change.weight is None and change.bias is None:
            own: Tensor = getattr(change.tensors, change.leaf)
            return own.float()
        assert change.weight is not None, f"{name!r} is a bias without a weight"
        new = self._merged(change, read)[change.leaf == "bias"]
        assert new is not None
        return new

    def _place(self, name: str) -> tuple[str, int | None]:
        target = self.weight_map.resolve(name)
        return target.name, target.part

    def _ties(self, base: LoadedModel) -> Mapping[str, str]:
        # Only a class that generates has the output head that a tie names.
        return self.weight_map.tie if stated_task(base.spec, base.model.config) in (None, Task.GENERATE) else {}

    def _take_modules(
        self, base: LoadedModel, stored: Mapping[tuple[str, int | None], str], taken: frozenset[str]
    ) -> dict[str, _ModuleChange]:
        """A place for each module of the files; gives the changes of heads without numbers of their own in the files."""
        ties = self._ties(base)
        tied: dict[str, _ModuleChange] = {}
        for module, tensors in self.files.modules.items():
            weight, bias = (stored.get(self._place(f"{module}.{leaf}")) for leaf in ("weight", "bias"))
            for leaf in _leaves(tensors):
                place = self._place(f"{module}.{leaf}")
                name = stored.get(place)
                change = _ModuleChange(module, tensors, leaf, weight, bias)
                if module in taken:
                    # A head of another number of labels: the base's numbers have no part in it.
                    name = name or f"{module}.{leaf}"
                    if name not in self.checkpoint.tensors:
                        self.beside[name] = self._any_place()
                    self._take(self.changes, name, _ModuleChange(module, tensors, leaf, None, None))
                elif name is None and place[0] in ties and (ties[place[0]], None) in stored:
                    self._take(tied, place[0], change)
                # Nothing is skipped silently: a merge that leaves parts out would be a different model.
                elif name is None:
                    raise self._no_place(change, stored)
                else:
                    self._take(self.changes, name, change)
        return tied

    def _any_place(self) -> str:
        """A tensor whose file, and dtype, a new one can share."""
        return next(name for name, one in reversed(self.checkpoint.tensors.items()) if one.dtype in FLOATS)

    def _take(self, changes: dict[str, _ModuleChange], name: str, change: _ModuleChange) -> None:
        if name in changes:
            raise AdapterError(
                f"{self.files.path} changes {change.module!r} twice, under two spellings",
                hint="keep the tensors of one spelling; PEFT's save_pretrained writes each once",
            )
        changes[name] = change

    def _no_place(self, change: _ModuleChange, stored: Mapping[tuple[str, int | None], str]) -> AdapterError:
        if change.leaf == "bias" and change.weight is not None:
            return AdapterError(
                f"{self.files.path} changes the bias of {change.module!r}, which has none in {self.checkpoint.path}",
                hint="use it unmerged: an adapter may add a bias, a checkpoint of this architecture may not",
            )
        if change.tensors.pair is None and change.tensors.tokens is None:
            return AdapterError(
                f"{self.files.path} holds {change.module!r} whole, which {self.checkpoint.path} does not have, and does not "
                "say that it is a head",
                hint='if it is one, add its task to adapter_config.json: "task_type": "SEQ_CLS" or "TOKEN_CLS"',
            )
        close = nearest(change.module, {name.rpartition(".")[0] for name in stored.values()})
        model_type = self.checkpoint.config["model_type"]
        return AdapterError(
            f"{self.files.path} changes {change.module!r}, which the {model_type!r} checkpoint {self.checkpoint.path} does "
            f"not have; it was trained on {self.files.settings.trained_on}",
            hint=f"the nearest layer here is {close!r}" if close else "merge it into the base that it was trained on",
        )

    def _tie(
        self,
        embedding: str,
        head: str,
        stored: Mapping[tuple[str, int | None], str],
        tied: Mapping[str, _ModuleChange],
    ) -> None:
        """What a change of an embedding, of the head that shares its weight, or of both comes to."""
        below, above = stored.get((embedding, None)), stored.get((head, None))
        if below is None:
            return
        one = self.changes.pop(below, None)
        other = tied.get(head) or (self.changes.pop(above, None) if above is not None else None)
        if one is None and other is None:
            return
        modules = [one.module if one is not None else embedding, other.module if other is not None else head]
        lower, upper = (side.tensors if side is not None else None for side in (one, other))
        if above is None:
            lower, upper = share_tie(self.files, modules, lower, upper)
        else:  # the head has numbers of its own in the files
            upper = share_tokens(lower, upper)
        read = self.checkpoint.reader()
        old, old_head = read(below), read(above or below)
        sides = [
            _ModuleChange(module, tensors or _NOTHING, "weight", name, None)
            for module, tensors, name in zip(modules, (lower, upper), (below, above or below), strict=True)
        ]
        new, new_head = (self._side(side, read) for side in sides)
        if not _same(new, old):
            self.changes[below] = sides[0]
        if above is None and _same(new, new_head):
            return
        name = above or self.weight_map.stored_name(head)
        if above is None:
            self.beside[name] = below
        if above is None or not _same(new_head, old_head):
            self.changes[name] = sides[1]
        if not _same(new, new_head):
            self.config["tie_word_embeddings"] = False
            self.notes.append(
                f"{below!r} and {name!r} shared one weight and do not any more: both are written, and config.json says "
                "tie_word_embeddings: false"
            )

    def _side(self, side: _ModuleChange, read: Reader) -> Tensor:
        """The weight of one side of a tie; rounded first, as that decides whether both still are one."""
        assert side.weight is not None
        old = read(side.weight)
        if side.tensors is _NOTHING:
            return old
        new, _ = self._merged(side, read)
        return new.to(old.dtype) if self.rounded else new

    def _check_vocabulary(self, base: LoadedModel, stored: Mapping[tuple[str, int | None], str]) -> None:
        """Where the adapter adds tokens, each table of the vocabulary must have a row for all of them."""
        if not self.added:
            return
        held: dict[str, ModuleTensors] = {}
        for path in vocabulary_tables(base):
            name = stored.get((f"{path}.weight", None)) or self.weight_map.stored_name(f"{path}.weight")
            if name in self.changes:
                held[path] = self.changes[name].tensors
            elif name in self.checkpoint.tensors:
                held[path] = _NOTHING
            # Else it is tied still, and has the rows of the embedding.
        refuse_missing_rows(self.files, base, held, self.vocabulary + self.added)
        aliases = type(base.model.config).aliases
        keys = [key for key, common in aliases.items() if common == "vocab_size" and key in self.config]
        self.config.update(dict.fromkeys([*keys, "vocab_size"], self.vocabulary + self.added))
        self.notes.append(f"the adapter adds {self.added} tokens: the vocabulary has {self.vocabulary + self.added}")

    def _note_unsupported(self) -> None:
        """Heads that are not supported may be tied to an embedding that changed; only their own class knows."""
        # Only a change of a table as long as the vocabulary can part a tie.
        if not any(
            change.tensors.tokens is not None or change.embeddings == self.vocabulary
            for change in self.changes.values()
        ):
            return
        headers = self.checkpoint.tensors.items()
        heads = [name for name, one in headers if self.weight_map.ignores(name) and one.shape[:1] == (self.vocabulary,)]
        if heads:
            self.notes.append(
                f"heads that are not supported were copied as they are, and may be tied to the embedding: {listed(heads)}"
            )

    def _state_head(self, base: LoadedModel, task: Task, head: Head) -> None:
        """Say in the configuration which head the checkpoint has now, unless it had one of as many labels already."""
        labels = _labels(head)
        stated = stated_task(base.spec, base.model.config)
        if stated is task and task in base.model.tasks and len(_labels(base.model.head(task))) == len(labels):
            self._note_labels(base)
            return
        names = [name for name, of in base.spec.hf_architectures.items() if Task(of) is task]
        for key in ("num_labels", "problem_type"):
            self.config.pop(key, None)
        self.config["architectures"] = names[:1] or None
        self.config["id2label"] = {str(at): label for at, label in enumerate(labels)}
        self.config["label2id"] = {label: at for at, label in enumerate(labels)}
        self.notes.append(f"the head for {task.value!r} is the adapter's, with {len(labels)} labels: {listed(labels)}")

    def _note_labels(self, base: LoadedModel) -> None:
        stated = stated_task(base.spec, base.model.config)
        count = len(base.model.config.labels) if stated in CLASSIFICATION else None
        for change in self.changes.values():
            weight = change.tensors.weight
            if change.leaf == "weight" and weight is not None and change.tensors.rank is None and len(weight) == count:
                self.notes.append(
                    f"{change.module!r} is the adapter's now, and its {count} labels are still named as in the base"
                )

    def _shape(self, change: _ModuleChange, old: str) -> tuple[int, ...]:
        """The shape that a tensor of the files has under a change of it."""
        shape = self.checkpoint.tensors[old].shape
        if not self.added or change.leaf == "bias" or shape[0] != self.vocabulary:
            return shape
        rows = self.vocabulary + self.added
        return (rows, *shape[1:]) if holds_rows(change.tensors, self.vocabulary, rows) else shape

    def _check_shapes(self) -> None:
        """What does not fit is found by its shape, before any number is read."""
        for change in self.changes.values():
            if change.weight is not None:
                empty = self._layer(change, self._empty, torch.device("meta"))
                layer_deltas(self.files, change.tensors.meta(saved=True), empty)

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self.checkpoint.tensors[name].shape, device="meta")

    def _merged(self, change: _ModuleChange, read: Reader) -> tuple[Tensor, Tensor | None]:
        """The new weight and bias of a module in float32, stored as the old ones are."""
        layer = self._layer(change, read, torch.device("cpu"))
        weight, bias = layer.base("weight"), layer.base("bias")
        assert weight is not None
        new, new_bias = weight.float(), bias.float() if bias is not None else None
        for delta in layer_deltas(self.files, change.tensors, layer):
            new, new_bias = delta.merged(new, new_bias)
        return layer.saved("weight", new), new_bias

    def _layer(self, change: _ModuleChange, read: Reader, device: torch.device) -> Layer:
        assert change.weight is not None
        weight = read(change.weight)
        bias = read(change.bias) if change.bias is not None else None
        # GPT-2's Conv1D stores [in, out]; deltas know [out, in] only.
        transposed = self.weight_map.resolve(change.weight).transpose and weight.dim() == 2
        if rows := self._shape(change, change.weight)[0] - len(weight):
            # Of added tokens, whose numbers are the adapter's.
            weight = torch.cat([weight, weight.new_zeros(rows, *weight.shape[1:])])
        turned = weight.t() if transposed else weight
        return Layer(
            change.module,
            kind="vector",  # seen in errors only for what is no matrix
            shape=tuple(turned.shape),
            embeds=weight.dim() == 2 and not transposed,
            multiplies=weight.dim() == 2,
            shifts=False,
            device=device,
            base=lambda leaf: turned if leaf == "weight" else bias,
            saved=lambda leaf, tensor: tensor.t() if leaf == "weight" and transposed else tensor,
            rows=lambda tensor: tensor,
        )


def read_mergeable(adapter: str | Path) -> PeftFiles:
    """The files of an adapter that has weights to merge; raises AdapterError for heads that draft tokens."""
    if is_medusa(Path(adapter)):
        raise AdapterError(
            f"{adapter} has Medusa heads, which draft tokens: they have no place in the weights of a base",
            hint="use it unmerged: load(..., adapters={'NAME': SOURCE})",
        )
    return read_peft(adapter)


def _leaves(tensors: ModuleTensors) -> list[str]:
    """Which tensors of its module an adapter changes."""
    roles = {role for role, _ in tensors.items()}
    biases = {"bias", "b_bias"}
    return [leaf for leaf, changed in (("weight", roles - biases), ("bias", roles & biases)) if changed]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _labels(head: Head) -> tuple[str, ...]:
    """What a classifying head answers."""
    return cast("TokenClassificationHead | SequenceClassificationHead", head).labels
