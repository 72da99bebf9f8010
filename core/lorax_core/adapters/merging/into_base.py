"""One adapter into the weights of its base, for a checkpoint of its own.

Decides what the new folder holds: the base's files, names and dtypes, a shard at a time. What becomes of a tensor is decided in
`plan`. Knows nothing of running models.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_core.adapters.formats.peft import PeftFiles
from lorax_core.adapters.formats.text_files import text_files
from lorax_core.adapters.merging.plan import MergePlan, read_mergeable
from lorax_core.errors import AdapterError, listed
from lorax_core.output import check_free, new_folder, refuse_inputs_inside
from lorax_core.plugins.host import PluginHost
from lorax_core.progress import Progress, Report, reporting
from lorax_core.untrusted import guarded
from lorax_core.weights.checkpoint import Checkpoint, opened

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
    progress: Report | None = None,
) -> MergedBase:
    """Write the checkpoint `base` with an adapter in its weights: the same files, names and dtypes, computed in float32.

    Where the output head shares the embedding's weight and the adapter changes one of them alone, both are written and
    `config.json` says `tie_word_embeddings: false`; trained tokens change both sides of a tie, as in PEFT. A head of the
    adapter's own becomes the checkpoint's, and tokens that the adapter adds enlarge its vocabulary; `config.json` says so.
    `notes` name all of this, and weights in other formats, which are not copied as other files are. Without a `host` the
    installed plugins are asked.

    Raises AdapterError naming the module that the base does not have or that has another shape, CheckpointError for a base that
    cannot be read, PluginError when no plugin supports its `model_type`; `out` is then as it was.
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
    files = adapter if isinstance(adapter, PeftFiles) else read_mergeable(adapter)
    plan = MergePlan.of(checkpoint, files, host or PluginHost.discover(), rounded=True)
    writer = _Writer(plan, list(plan.notes))
    with new_folder(final, AdapterError, overwrite=overwrite) as folder:
        writer.write(folder, reporting(progress))
    return MergedBase(final, tuple(sorted(plan.changes)), tuple(writer.notes))


@dataclass
class _Writer:
    """Writes the files of a merged checkpoint."""

    plan: MergePlan
    notes: list[str]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.plan.checkpoint

    def write(self, folder: Path, report: Report) -> None:
        """Everything into an empty folder."""
        sizes: dict[str, tuple[int, int]] = {}
        for done, file in enumerate(self.checkpoint.files):
            report(Progress("writing files", done, len(self.checkpoint.files)))
            sizes |= self._write_shard(file, folder / file.relative_to(self.checkpoint.path))
        report(Progress("writing files", len(self.checkpoint.files), len(self.checkpoint.files)))
        self._write_index(folder, sizes)
        self._copy_others(folder)
        # Last, over the copy of the base's config.json.
        if self.plan.config != self.checkpoint.config:
            (folder / "config.json").write_text(json.dumps(self.plan.config, indent=2) + "\n", encoding="utf-8")

    def _write_shard(self, file: Path, out: Path) -> dict[str, tuple[int, int]]:
        """Write one file; gives how much larger it is for each of its tensors, in bytes and in numbers, where it is."""
        with opened(file) as found:
            metadata = found.metadata()
            tensors: dict[str, Tensor] = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118  (no mapping)
        grown: dict[str, tuple[int, int]] = {}
        # A tensor that is new goes into a file that is there, so that each file is written once.
        beside = {new: old for new, old in self.plan.beside.items() if old in tensors}
        for name in [*tensors, *beside]:
            if name not in self.plan.changes:
                continue
            old = tensors.get(name)
            new = self._new(name, (old if old is not None else tensors[beside[name]]).dtype)
            before = (old.nbytes, old.numel()) if old is not None else (0, 0)
            grown[name] = (new.nbytes - before[0], new.numel() - before[1])
            tensors[name] = new
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out, metadata=metadata)
        return grown

    def _new(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor of this name in the files, in the dtype of the old one."""
        new = self.plan.tensor(name, self.checkpoint.reader()).to(dtype)
        # float16 ends at 65504; a sum in float32 may be past it though base and adapter are not.
        if not torch.isfinite(new).all():
            raise AdapterError(
                f"{self.plan.files.path} makes {name!r} larger than {dtype} can hold",
                hint="convert the base to bfloat16 or float32 first",
            )
        return new.contiguous().clone()

    def _write_index(self, folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
        index = self.checkpoint.json(_INDEX)
        if not isinstance(index, dict):
            return
        places = dict(index["weight_map"])
        metadata = dict(index.get("metadata") or {})
        for name, beside in self.plan.beside.items():
            places[name] = places[beside]
        for at, key in enumerate(("total_size", "total_parameters")):
            if isinstance(metadata.get(key), (int, float)):
                metadata[key] += sum(more[at] for more in sizes.values())
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
        if texts := [file.name for file in text_files(self.plan.files.path)]:
            self.notes.append(
                f"the tokenizer and chat template are the base's; the adapter's were not copied: {listed(texts)}"
            )
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
