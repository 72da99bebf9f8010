"""Several LoRA adapters into one.

Decides what can be combined, which module meets which, and how the result is written as PEFT writes adapters. Knows nothing
of models, only of files. Magnitudes, biases and saved modules cannot be combined: an error names them.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles, read_peft
from lorax_core.adapters.formats.settings import FILE, PeftSettings
from lorax_core.adapters.merging.combining import (
    Mask,
    MergeOptions,
    ScaledPair,
    SignMethod,
    combined,
    seeded_mask,
)
from lorax_core.errors import AdapterError
from lorax_core.output import check_free, new_folder, refuse_inputs_inside
from lorax_core.progress import Progress, Report, reporting, silent
from lorax_core.untrusted import guarded

# Roles that a sum of low-rank updates has no place for, and how they are called.
_NO_SUM = {"magnitude": "a DoRA magnitude", "b_bias": "a bias of lora_B (lora_bias)", "tokens": "trained token rows"}
_TENSORS = "adapter_model.safetensors"


@dataclass(frozen=True)
class MergedAdapter:
    """What was written. `ranks` has the distinct ranks, ascending; `notes` are sentences on what a reader may not expect."""

    path: Path
    strategy: str
    modules: int
    ranks: tuple[int, ...]
    notes: tuple[str, ...]


@guarded(AdapterError, "the adapters were not merged", hint="merge_adapters([FOLDER, FOLDER], OUT)")
def merge_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    strategy: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    majority_sign_method: SignMethod = "total",
    overwrite: bool = False,
    progress: Report | None = None,
) -> MergedAdapter:
    """Combine adapter folders into a new one, an ordinary PEFT adapter; the arithmetic is that of `add_weighted_adapter`.

    - `strategy`: `linear`, `ties`, `dare_linear`, `dare_ties` (of equal ranks), `cat` (exact; ranks add up) or `svd` (the
      best approximation of the exact sum by `rank` ranks, by default the largest of the adapters).
    - `weights`: one for each adapter, 1 by default; negative ones subtract.
    - `density`: for `ties`, `dare_linear` and `dare_ties`, the share of numbers to keep, in (0, 1].
    - `seed`: of the random numbers of `dare_linear` and `dare_ties`, 0 by default. torch's own are not touched. A seed
      gives the same result each time, but not what PEFT's random numbers give.
    - `majority_sign_method`: for `ties` and `dare_ties`, `total` or `frequency`.

    Raises AdapterError, leaving `out` as it was, for settings that do not fit, adapters that hold more than low-rank updates
    (named with the module), shapes or ranks that do not go together, and an `out` that holds files.
    """
    # Before the adapters are read, so that a taken folder costs no wait; `new_folder` checks again.
    check_free(Path(out), AdapterError, overwrite)
    if isinstance(adapters, (str, Path)):
        raise AdapterError(f"one adapter was given, {str(adapters)!r:.80}", hint="give a list of folders")
    options = merge_options(adapters, strategy, weights, density, seed, rank, majority_sign_method)
    refuse_inputs_inside(Path(out), adapters, AdapterError)
    files, notes = combine([read_peft(path) for path in adapters], options, report=reporting(progress))
    with new_folder(out, AdapterError, overwrite=overwrite) as folder:
        save_file(_named(files), folder / _TENSORS, metadata={"format": "pt"})
        written = files.settings.model_dump(exclude={"path"}, exclude_unset=True)
        (folder / FILE).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", "utf-8")
    return MergedAdapter(Path(out), strategy, len(files.modules), files.ranks, tuple(notes))


def merge_options(
    adapters: Sequence[object],
    strategy: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int | None = None,
    rank: int | None = None,
    majority_sign_method: str = "total",
) -> MergeOptions:
    """Checked options for so many adapters; raises AdapterError as `merge_adapters` says."""
    if not isinstance(adapters, Sequence) or not adapters:
        raise AdapterError("there is no adapter to merge", hint="give one or more adapter folders")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise AdapterError(
            f"there are {len(adapters)} adapters, but {len(weights)} weights: {list(weights)}",
            hint="give one for each adapter, in their order, or none at all",
        )
    return MergeOptions(strategy, tuple(map(float, weights)), density, seed, rank, majority_sign_method)


def combine(
    adapters: Sequence[PeftFiles], options: MergeOptions, *, mask: Mask | None = None, report: Report = silent
) -> tuple[PeftFiles, list[str]]:
    """One adapter in memory, in float32 and with scale 1, and notes; raises AdapterError as `merge_adapters` says.

    `mask` draws what dare keeps, module by module in sorted order, A of each adapter and then B; by default from the seed.
    """
    for files in adapters:
        _refuse_more_than_updates(files)
    _refuse_two_spellings(adapters)
    rank = options.rank or max(_stated_rank(files) for files in adapters)
    names = sorted({module for files in adapters for module in files.modules})
    members = {module: _members(module, adapters, options) for module in names}
    mask = mask or (seeded_mask(options.seed or 0) if options.draws else None)
    modules: dict[str, ModuleTensors] = {}
    ranks: dict[str, int] = {}
    for done, (module, found) in enumerate(members.items()):
        report(Progress("combining modules", done, len(members)))
        a, b = combined([one.update for one in found], options, rank, mask)
        weight, ranks[module] = _shared_base(module, found), len(a)
        if found[0].embedding:
            modules[module] = ModuleTensors(embedding_a=a, embedding_b=b, weight=weight)
        else:
            modules[module] = ModuleTensors(a=a, b=b, weight=weight)
    report(Progress("combining modules", len(members), len(members)))
    config, notes = _settings(adapters, ranks)
    if len(adapters) > 1 and not set.intersection(*(set(files.modules) for files in adapters)):
        notes.append("no module is in all of the adapters: were they trained on one base?")
    path = adapters[0].path if len(adapters) == 1 else Path(" + ".join(files.path.name for files in adapters))
    return PeftFiles(path, PeftSettings(path=path, **config), modules), notes


def _refuse_more_than_updates(files: PeftFiles) -> None:
    for module, tensors in files.modules.items():
        saved = [leaf for leaf in ("weight", "bias") if getattr(tensors, leaf) is not None]
        what = next((what for role, what in _NO_SUM.items() if getattr(tensors, role) is not None), None)
        hint = "merge it into its base alone: merge_into_base, or `lorax adapters merge ADAPTER --base BASE`"
        # A weight under a low-rank update is the base's own; `_shared_base` sees to it.
        if what is None and ("bias" in saved or (saved and tensors.pair is None)):
            what = "a bias" if saved == ["bias"] else "a saved module (modules_to_save) or a head"
            hint = "train with bias='none' and without modules_to_save what is to be combined"
        if what is not None:
            raise AdapterError(
                f"{files.path} holds {what} for {module!r}, which cannot be combined with other adapters", hint=hint
            )


def _stem(module: str) -> str:
    """What stands before the number of the layer; empty where there is none."""
    found = re.match(r"(.*?)\.?\d+\.", module)
    return found[1] if found else ""


def _refuse_two_spellings(adapters: Sequence[PeftFiles]) -> None:
    """`layers.0` of one and `model.layers.0` of another are one layer, which cannot be known for sure without a model."""
    stems = [{stem for stem in map(_stem, files.modules) if stem} for files in adapters]
    for (short, ones), (long, others) in itertools.permutations(zip(adapters, stems, strict=True), 2):
        for one, other in itertools.product(ones - others, others - ones):
            if other.endswith(f".{one}"):
                raise AdapterError(
                    f"{short.path} calls layers {one!r} and {long.path} calls them {other!r}: they were trained on two "
                    "classes of one model, and their modules do not meet",
                    hint="merge them into the base one after another",
                )


def _stated_rank(files: PeftFiles) -> int:
    """The largest rank of an adapter as PEFT counts it: what the settings say, used or not."""
    # PEFT sizes the default of svd by r even where no module uses it, so reading tensors alone would differ.
    return max(files.settings.ranks)


@dataclass(frozen=True)
class _Member:
    """What one adapter does to a module: its update, whether that is of an embedding, and the base's weight under it."""

    path: Path
    update: ScaledPair
    embedding: bool
    under: Tensor | None

    @property
    def sizes(self) -> str:
        """What the module is by the shapes of the update, for errors."""
        kind = "an embedding" if self.embedding else "a layer"
        return f"{kind} from {self.update.a.shape[1]} to {self.update.b.shape[0]}"


def _members(module: str, adapters: Sequence[PeftFiles], options: MergeOptions) -> list[_Member]:
    """The updates of a module by the adapters that have it."""
    found: list[_Member] = []
    for files, weight in zip(adapters, options.weights, strict=True):
        tensors = files.modules.get(module)
        if tensors is None or tensors.pair is None:
            continue
        # [rank, in] and [out, rank]; of an embedding [rank, vocab] and [dim, rank]
        a, b = tensors.pair
        update = ScaledPair(a.float(), b.float(), weight * files.settings.scale(module, a.shape[0]))
        found.append(_Member(files.path, update, tensors.embedding_a is not None, tensors.weight))
        _check_together(module, found[0], found[-1], options)
    return found


def _check_together(module: str, one: _Member, other: _Member, options: MergeOptions) -> None:
    if one.sizes != other.sizes:
        raise AdapterError(
            f"{module!r} is {one.sizes} in {one.path} and {other.sizes} in {other.path}: they were trained on different bases",
            hint="merge adapters of one base; base_model_name_or_path in adapter_config.json names it",
        )
    ranks = [len(member.update.a) for member in (one, other)]
    if options.needs_one_rank and ranks[0] != ranks[1]:
        raise AdapterError(
            f"{options.strategy!r} needs equal ranks, but {module!r} has rank {ranks[0]} in {one.path} and {ranks[1]} in "
            f"{other.path}",
            hint="strategy 'svd' or 'cat' takes any ranks; at a command line, --strategy svd",
        )


def _shared_base(module: str, members: Sequence[_Member]) -> Tensor | None:
    """The base's weight that PEFT may save under an update of an embedding; all must hold the same."""
    first = members[0].under
    for member in members:
        weight = member.under
        # torch.equal takes no None, and one that holds a weight where another does not is a difference.
        same = weight is first if weight is None or first is None else torch.equal(weight, first)
        if not same:
            raise AdapterError(
                f"{members[0].path} and {member.path} do not hold the same base weight under {module!r}, so there is no one "
                "base for both",
                hint="save them with save_pretrained(..., save_embedding_layers=False) where the base was not changed",
            )
    return first


def _settings(adapters: Sequence[PeftFiles], ranks: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the result, written as new: those of the first adapter may not hold for the others."""
    notes: list[str] = []
    agreed: dict[str, Any] = {}
    for name in ("base_model_name_or_path", "revision", "task_type"):
        said = list(dict.fromkeys(getattr(files.settings, name) for files in adapters))
        # A missing name or revision is no contradiction; a missing task type is: it is then not one task.
        known = [value for value in said if value is not None]
        agreed[name] = known[0] if known and (name != "task_type" or len(said) == 1) else None
        if len(known) > 1 or (name == "task_type" and len(said) > 1):
            notes.append(f"the adapters differ in {name}: {', '.join(map(repr, said))}; written is {agreed[name]!r}")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Anchored, so that a name never stands for the end of another.
    others = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    config = {
        **agreed,
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the scales are in the tensors
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(ranks),  # in full, for short names may reach what no adapter changed
        "fan_in_fan_out": any(files.settings.fan_in_fan_out for files in adapters),
        "init_lora_weights": True,
    }
    return config, notes


def _named(files: PeftFiles) -> dict[str, Tensor]:
    names = {
        "a": "lora_A.weight",
        "b": "lora_B.weight",
        "embedding_a": "lora_embedding_A",
        "embedding_b": "lora_embedding_B",
        "weight": "base_layer.weight",
    }
    return {
        # A clone each: safetensors refuses tensors that share memory.
        f"base_model.model.{module}.{names[role]}": tensor.contiguous().clone()
        for module, tensors in files.modules.items()
        for role, tensor in tensors.items()
    }
