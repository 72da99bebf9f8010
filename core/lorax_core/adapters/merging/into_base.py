"""One adapter into the weights of its base, for a checkpoint of its own.

Decides which tensor of the files each part of an adapter changes. Works in the orientation of the files, a shard at a time;
what is done to a layer is decided in `formats.layer`. Knows nothing of running models.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_core.adapters.formats.layer import Layer, layer_deltas, share_tie, share_tokens
from lorax_core.adapters.formats.lora import check_saved_whole
from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles, read_peft
from lorax_core.adapters.merging.merge import Progress
from lorax_core.errors import AdapterError, listed, nearest
from lorax_core.modeling.config import ModelConfig
from lorax_core.modeling.heads import CLASSIFICATION
from lorax_core.output import check_free, new_folder, refuse_inputs_inside
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.resolve import load_class
from lorax_core.types import Task
from lorax_core.untrusted import guarded
from lorax_core.weights.checkpoint import Checkpoint, opened
from lorax_core.weights.loader import Backbone, stated_task
from lorax_core.weights.mapping import WeightMap

_INDEX: Final = "model.safetensors.index.json"
# The same weights in other formats: a copy would still hold the base's numbers.
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".ot", ".gguf", ".safetensors")
_EXPORTS: Final = (".onnx", ".onnx_data", ".tflite", ".mlmodel")


@dataclass(frozen=True)
class MergedBase:
    """What was written: the tensors that changed or are new, by their names in the files, and notes for the user."""

    path: Path
    changed: tuple[str, ...]
    notes: tuple[str, ...]


@guarded(AdapterError, "the adapter was not merged", hint="merge_into_base(BASE, ADAPTER, OUT)")
def merge_into_base(
    base: str | Path,
    adapter: str | Path | PeftFiles,
    out: str | Path,
    host: PluginHost | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergedBase:
    """Write the checkpoint `base` with an adapter in its weights: the same files, names and dtypes, computed in float32.

    Where the output head shares the embedding's weight and the adapter changes one of them alone, both are written and
    `config.json` says `tie_word_embeddings: false`; `notes` says so. Trained tokens change both sides of a tie, as in PEFT.
    Other files are copied, but for weights in other formats, which are named in `notes`. Without a `host` the installed plugins
    are asked.

    Raises AdapterError naming the module that the base does not have (a head of the adapter's own among them) or that has
    another shape, CheckpointError for a base that cannot be read, PluginError when no plugin supports its `model_type`; `out`
    is then as it was.
    """
    final = Path(out)
    check_free(final, AdapterError, overwrite)
    checkpoint = Checkpoint(base)
    # The base is copied file by file: inside it, the copy would meet itself, and the base be replaced.
    if final.resolve().is_relative_to(checkpoint.path.resolve()):
        raise AdapterError(f"{out} is the base's own folder, or inside it", hint="give a folder of its own")
    refuse_inputs_inside(
        final, [checkpoint.path, *([adapter] if not isinstance(adapter, PeftFiles) else [adapter.path])], AdapterError
    )
    _refuse_links(checkpoint)
    files = adapter if isinstance(adapter, PeftFiles) else read_peft(adapter)
    plan = _Plan.of(checkpoint, files, host or PluginHost.discover())
    with new_folder(final, AdapterError, overwrite=overwrite) as folder:
        plan.write(folder, progress)
    return MergedBase(final, tuple(plan.changed), tuple(plan.notes))


@dataclass(frozen=True)
class _ModuleChange:
    """A module of the adapter, and what its weight and bias are called in the checkpoint's files (None: not there)."""

    module: str
    tensors: ModuleTensors
    weight: str | None
    bias: str | None

    @property
    def embeddings(self) -> int:
        """How many rows a table of embeddings has for this to be of one; 0 when it is of none, or that cannot be seen."""
        if self.tensors.embedding_a is not None:
            return self.tensors.embedding_a.shape[1]
        return len(self.tensors.weight) if self.tensors.weight is not None else 0


@dataclass
class _Plan:
    """Which tensor of a checkpoint changes how, all of it found before anything is written."""

    checkpoint: Checkpoint
    files: PeftFiles
    weight_map: WeightMap
    changes: dict[str, _ModuleChange] = field(default_factory=dict)  # by name in the files
    added: dict[str, Tensor] = field(default_factory=dict)  # by name in the files: the two sides of a tie
    beside: dict[str, str] = field(default_factory=dict)  # a name that is new to the tensor in whose file it goes
    untied: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint, files: PeftFiles, host: PluginHost) -> _Plan:
        """The plan; raises AdapterError for a part of the adapter that has no place."""
        spec = host.architecture(checkpoint.config["model_type"])
        owner = host.owner(spec.model_type)
        config = cast("type[ModelConfig]", load_class(spec.config, owner)).parse(checkpoint.config)
        weight_map = cast("Backbone", load_class(spec.backbone, owner)).weight_map(config)
        plan = cls(checkpoint, files, weight_map)
        check_saved_whole(files, (name for name in checkpoint.tensors if not weight_map.ignores(name)), weight_map)
        stored = {_place(weight_map, name): name for name in checkpoint.tensors}
        # Only a class that generates has the output head that a tie names.
        stated = stated_task(spec, config)
        ties = weight_map.tie if stated in (None, Task.GENERATE) else {}
        tied: dict[str, _ModuleChange] = {}  # changes of heads without numbers of their own in the files
        for module, tensors in files.modules.items():
            names = [stored.get(_place(weight_map, f"{module}.{leaf}")) for leaf in ("weight", "bias")]
            change = _ModuleChange(module, tensors, *names)
            for leaf in _leaves(tensors):
                place = _place(weight_map, f"{module}.{leaf}")
                name = stored.get(place)
                if name is None and place[0] in ties and (ties[place[0]], None) in stored:
                    plan._take(tied, place[0], change)
                # Nothing is skipped silently: a merge that leaves parts out would be a different model.
                elif name is None:
                    raise plan._no_place(change, leaf, stored)
                else:
                    plan._take(plan.changes, name, change)
        for head, embedding in ties.items():
            plan._tie(embedding, head, stored, tied)
        plan._note_unsupported(config.vocab_size)
        if stated in CLASSIFICATION:
            plan._note_labels(len(config.labels))
        return plan

    @property
    def changed(self) -> list[str]:
        """The tensors that are not the base's, sorted."""
        return sorted({*self.changes, *self.added})

    def write(self, folder: Path, progress: Progress | None) -> None:
        """Everything into an empty folder."""
        for done, file in enumerate(self.checkpoint.files):
            if progress is not None:
                progress(done, len(self.checkpoint.files))
            self._write_shard(file, folder / file.relative_to(self.checkpoint.path))
        if progress is not None:
            progress(len(self.checkpoint.files), len(self.checkpoint.files))
        self._write_index(folder)
        self._copy_others(folder)
        # Last, over the copy of the base's config.json.
        if self.untied:
            config = {**self.checkpoint.config, "tie_word_embeddings": False}
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _take(self, changes: dict[str, _ModuleChange], name: str, change: _ModuleChange) -> None:
        if name in changes:
            raise AdapterError(
                f"{self.files.path} changes {change.module!r} twice, under two spellings",
                hint="keep the tensors of one spelling; PEFT's save_pretrained writes each once",
            )
        changes[name] = change

    def _no_place(self, change: _ModuleChange, leaf: str, stored: dict[tuple[str, int | None], str]) -> AdapterError:
        if leaf == "bias" and change.weight is not None:
            return AdapterError(
                f"{self.files.path} changes the bias of {change.module!r}, which has none in {self.checkpoint.path}",
                hint="use it unmerged: an adapter may add a bias, a checkpoint of this architecture may not",
            )
        if change.tensors.pair is None and change.tensors.tokens is None:
            return AdapterError(
                f"{self.files.path} holds {change.module!r} whole, which {self.checkpoint.path} does not have: a head of the "
                "adapter's own cannot be merged",
                hint="use it unmerged, or merge it into a checkpoint of a class that has this head",
            )
        close = nearest(change.module, {name.rpartition(".")[0] for name in stored.values()})
        model_type = self.checkpoint.config["model_type"]
        return AdapterError(
            f"{self.files.path} changes {change.module!r}, which the {model_type!r} checkpoint {self.checkpoint.path} does "
            f"not have; it was trained on {self.files.settings.trained_on}",
            hint=f"the nearest layer here is {close!r}" if close else "merge it into the base that it was trained on",
        )

    def _tie(
        self, embedding: str, head: str, stored: dict[tuple[str, int | None], str], tied: dict[str, _ModuleChange]
    ) -> None:
        """What a change of an embedding, of the head that shares its weight, or of both comes to."""
        below, above = stored.get((embedding, None)), stored.get((head, None))
        if below is None:
            return
        one = self.changes.get(below)
        other = tied.get(head) or (self.changes.get(above) if above is not None else None)
        if one is None and other is None:
            return
        old = self.checkpoint.tensor(below)
        old_head = self.checkpoint.tensor(above) if above is not None else old
        modules = [one.module if one is not None else embedding, other.module if other is not None else head]
        lower, upper = (side.tensors if side is not None else None for side in (one, other))
        if above is None:
            lower, upper = share_tie(self.files, modules, lower, upper)
        else:  # the head has numbers of its own in the files
            upper = share_tokens(lower, upper)
        # Each side is made in its own dtype first: that is what decides whether they still are one weight.
        new, new_head = (
            _merged(self.files, module, tensors, side)[0].to(side.dtype) if tensors is not None else side
            for module, tensors, side in zip(modules, (lower, upper), (old, old_head), strict=True)
        )
        # Both sides are here already: nothing is left to do for them while the shards are written.
        self.changes.pop(below, None)
        if not torch.equal(new, old):
            self.added[below] = new
        if new.shape == new_head.shape and torch.equal(new, new_head) and above is None:
            return
        name = above or self.weight_map.stored_name(head)
        self.changes.pop(name, None)
        if above is None:
            self.beside[name] = below
        if above is None or not torch.equal(new_head, old_head):
            self.added[name] = new_head
        if not torch.equal(new, new_head):
            self.untied = True
            self.notes.append(
                f"{below!r} and {name!r} shared one weight and do not any more: both are written, and config.json says "
                "tie_word_embeddings: false"
            )

    def _note_unsupported(self, vocabulary: int) -> None:
        """Heads that are not supported may be tied to an embedding that changed; only their own class knows."""
        # Only a change of a table as long as the vocabulary can part a tie; without one no head is read for its shape.
        if not any(
            change.tensors.tokens is not None or change.embeddings == vocabulary for change in self.changes.values()
        ):
            return
        ignored = [name for name in self.checkpoint.tensors if self.weight_map.ignores(name)]
        heads = [name for name in ignored if self.checkpoint.tensor(name).shape[:1] == (vocabulary,)]
        if heads:
            self.notes.append(
                f"heads that are not supported were copied as they are, and may be tied to the embedding: {listed(heads)}"
            )

    def _note_labels(self, count: int) -> None:
        for name, change in self.changes.items():
            weight = change.tensors.weight
            if name == change.weight and weight is not None and change.tensors.rank is None and len(weight) == count:
                self.notes.append(
                    f"{change.module!r} is the adapter's now, and its {count} labels are still named as in the base"
                )

    def _write_shard(self, file: Path, out: Path) -> None:
        with opened(file) as found:
            metadata = found.metadata()
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118  (not a mapping)
        # A head that is new goes in the file of its embedding, so that each file is written once.
        for name in [*tensors, *(new for new, beside in self.beside.items() if beside in tensors)]:
            if name in self.added or name in self.changes:
                tensors[name] = self._new(name)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out, metadata=metadata)

    def _new(self, name: str) -> Tensor:
        """The tensor of this name in the files, in the dtype of the old one."""
        new = self.added[name] if name in self.added else self._changed(name)
        # float16 ends at 65504; a sum in float32 may be past it though base and adapter are not.
        if not torch.isfinite(new).all():
            raise AdapterError(
                f"{self.files.path} makes {name!r} larger than {new.dtype} can hold",
                hint="convert the base to bfloat16 or float32 first",
            )
        return new.contiguous().clone()

    def _changed(self, name: str) -> Tensor:
        change = self.changes[name]
        assert change.weight is not None, f"{name!r} is a bias without a weight"
        weight = self.checkpoint.tensor(change.weight)
        bias = self.checkpoint.tensor(change.bias) if change.bias is not None else None
        # GPT-2's Conv1D stores [in, out]; deltas know [out, in] only.
        transposed = self.weight_map.resolve(change.weight).transpose
        merged = _merged(self.files, change.module, change.tensors, weight, bias, transposed)
        old, new = (weight, merged[0]) if name == change.weight else (bias, merged[1])
        assert old is not None
        assert new is not None
        return new.to(old.dtype)

    def _write_index(self, folder: Path) -> None:
        index = self.checkpoint.json(_INDEX)
        if not isinstance(index, dict):
            return
        places = dict(index["weight_map"])
        metadata = dict(index.get("metadata") or {})
        for name, beside in self.beside.items():
            places[name] = places[beside]
            for key, more in (("total_size", self.added[name].nbytes), ("total_parameters", self.added[name].numel())):
                if isinstance(metadata.get(key), (int, float)):
                    metadata[key] += more
        made: dict[str, Any] = {**index, "metadata": metadata, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")

    def _copy_others(self, folder: Path) -> None:
        written = {file.relative_to(self.checkpoint.path) for file in self.checkpoint.files} | {Path(_INDEX)}
        left: list[str] = []
        outside: list[str] = []
        roots = _roots(self.checkpoint.path.resolve())
        for path in sorted(self.checkpoint.path.rglob("*")):
            relative = path.relative_to(self.checkpoint.path)
            top = len(relative.parts) == 1
            # What is hidden belongs to the tools that fetched the files.
            if relative in written or not path.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            if path.suffix in _EXPORTS or (top and path.suffix in _OTHER_WEIGHTS):
                left.append(relative.as_posix())
                continue
            # A link may lead to any file of this machine, and the result may be published.
            if not any(path.resolve().is_relative_to(root) for root in roots):
                outside.append(relative.as_posix())
                continue
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
        if left:
            self.notes.append(f"not copied, for they hold the base's weights in other formats: {listed(left)}")
        if outside:
            self.notes.append(f"not copied, for they are links out of the base's folder: {listed(outside)}")


def _refuse_links(checkpoint: Checkpoint) -> None:
    """Numbers of a shard elsewhere would go into the result, and a configuration that is not copied leaves it broken."""
    roots = _roots(checkpoint.path.resolve())
    for file in (checkpoint.path / "config.json", *checkpoint.files):
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise AdapterError(
                f"'{file}' is a link out of the base's folder, which is not merged",
                hint="copy the file itself there, if it is meant",
            )


def _roots(folder: Path) -> list[Path]:
    """Where the files of a checkpoint may lie: in its folder, or for a snapshot of the hub's cache in that model's blobs."""
    is_snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return [folder, folder.parent.parent / "blobs"] if is_snapshot else [folder]


def _leaves(tensors: ModuleTensors) -> list[str]:
    """Which tensors of its module an adapter changes."""
    roles = {role for role, _ in tensors.items()}
    biases = {"bias", "b_bias"}
    return [leaf for leaf, changed in (("weight", roles - biases), ("bias", roles & biases)) if changed]


def _place(weight_map: WeightMap, name: str) -> tuple[str, int | None]:
    target = weight_map.resolve(name)
    return target.name, target.part


def _merged(
    files: PeftFiles,
    module: str,
    tensors: ModuleTensors,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The new weight and bias of a module in float32, stored as the old ones are: the weight `[in, out]` when `transposed`."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.t() if transposed and tensor.dim() == 2 else tensor

    layer = Layer(
        module,
        kind="vector",  # seen in errors only for what is no matrix
        shape=tuple(turned(weight).shape),
        embeds=weight.dim() == 2 and not transposed,
        multiplies=weight.dim() == 2,
        shifts=False,
        device=torch.device("cpu"),
        base=lambda leaf: turned(weight) if leaf == "weight" else bias,
        saved=lambda leaf, tensor: turned(tensor) if leaf == "weight" else tensor,
        rows=lambda tensor: tensor,
    )
    new, new_bias = turned(weight).float(), bias.float() if bias is not None else None
    for delta in layer_deltas(files, tensors, layer):
        new, new_bias = delta.merged(new, new_bias)
    return turned(new), new_bias
