"""Several LoRA adapters into one.

Decides what can be combined, which module meets which, and how the result is written as PEFT writes adapters. Knows nothing
of models: everything is read off the files. What has no sum (magnitudes, biases, saved modules) is refused by name.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles, read_peft
from lorax_core.adapters.merging.combining import (
    Mask,
    MergeOptions,
    Pair,
    ScaledPair,
    SignMethod,
    combined,
    seeded_mask,
)
from lorax_core.adapters.merging.output import check_free, new_folder
from lorax_core.errors import AdapterError

Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

# Roles that a sum of low-rank updates has no place for, and how they are called.
_NO_SUM = {"magnitude": "a DoRA magnitude", "b_bias": "a bias of lora_B (lora_bias)", "tokens": "trained token rows"}
_BASE_FILE, _SETTINGS_FILE = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class MergedAdapter:
    """What was written. `ranks` has the distinct ranks, ascending; `notes` are sentences on what a reader may not expect."""

    path: Path
    strategy: str
    modules: int
    ranks: tuple[int, ...]
    notes: tuple[str, ...]


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
    progress: Progress | None = None,
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
    check_free(Path(out), overwrite)
    options = merge_options(adapters, strategy, weights, density, seed, rank, majority_sign_method)
    files, notes = combine([read_peft(path) for path in adapters], options, progress=progress)
    with new_folder(out, overwrite=overwrite) as folder:
        save_file(_named(files), folder / _BASE_FILE, metadata={"format": "pt"})
        (folder / _SETTINGS_FILE).write_text(json.dumps(files.config, indent=2, sort_keys=True) + "\n", "utf-8")
    ranks = sorted({pair[0].shape[0] for _, pair in _pairs(files)})
    return MergedAdapter(Path(out), strategy, len(files.modules), tuple(ranks), tuple(notes))


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
    if not adapters:
        raise AdapterError("there is no adapter to merge", hint="give one or more adapter folders")
    weights = [1.0] * len(adapters) if weights is None else weights
    if len(weights) != len(adapters):
        raise AdapterError(f"there are {len(adapters)} adapters, but {len(weights)} weights: {list(weights)}")
    return MergeOptions(strategy, tuple(map(float, weights)), density, seed, rank, majority_sign_method)


def combine(
    adapters: Sequence[PeftFiles], options: MergeOptions, *, mask: Mask | None = None, progress: Progress | None = None
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
    for done, (module, found) in enumerate(members.items()):
        if progress is not None:
            progress(done, len(members))
        a, b = combined([update for update, _ in found], options, rank, mask)
        tensors = ModuleTensors(embedding_a=a, embedding_b=b) if found[0][1] else ModuleTensors(a=a, b=b)
        tensors.weight = _shared_base(module, adapters)
        modules[module] = tensors
    config, notes = _settings(adapters, {module: pair[0].shape[0] for module, pair in _named_pairs(modules)})
    path = adapters[0].path if len(adapters) == 1 else Path(" + ".join(files.path.name for files in adapters))
    return PeftFiles(path, config, modules), notes


def _pair(tensors: ModuleTensors) -> Pair | None:
    a, b = (tensors.a, tensors.b) if tensors.a is not None else (tensors.embedding_a, tensors.embedding_b)
    return (a, b) if a is not None and b is not None else None


def _named_pairs(modules: dict[str, ModuleTensors]) -> Iterable[tuple[str, Pair]]:
    for module, tensors in modules.items():
        pair = _pair(tensors)
        if pair is not None:
            yield module, pair


def _pairs(files: PeftFiles) -> Iterable[tuple[str, Pair]]:
    return _named_pairs(files.modules)


def _refuse_more_than_updates(files: PeftFiles) -> None:
    for module, tensors in files.modules.items():
        for role, what in _NO_SUM.items():
            if getattr(tensors, role) is not None:
                raise AdapterError(
                    f"{files.path} holds {what} for {module!r}, which cannot be combined with other adapters",
                    hint="merge it into its base alone: merge_into_base, or `lorax adapters merge ADAPTER --base BASE`",
                )
        saved = [leaf for leaf in ("weight", "bias") if getattr(tensors, leaf) is not None]
        # A weight beneath a low-rank update is the base's own; `_shared_base` sees to it.
        if "bias" in saved or (saved and _pair(tensors) is None):
            what = "a bias" if saved == ["bias"] else "a saved module (modules_to_save) or a head"
            raise AdapterError(
                f"{files.path} holds {what} for {module!r}, which cannot be combined with other adapters",
                hint="train with bias='none' and without modules_to_save what is to be combined",
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
    said = [files.config.get("r"), *(files.config.get("rank_pattern") or {}).values()]
    found = [pair[0].shape[0] for _, pair in _pairs(files)]
    return max([rank for rank in said if isinstance(rank, int)] or found)


def _members(module: str, adapters: Sequence[PeftFiles], options: MergeOptions) -> list[tuple[ScaledPair, bool]]:
    """The updates of a module by the adapters that have it, and whether they are of an embedding."""
    found: list[tuple[ScaledPair, bool]] = []
    first: PeftFiles | None = None
    for files, weight in zip(adapters, options.weights, strict=True):
        pair = _pair(files.modules[module]) if module in files.modules else None
        if pair is None:
            continue
        (a, b), embedding = pair, files.modules[module].embedding_a is not None
        update = ScaledPair(a.float(), b.float(), weight * files.scale(module, a.shape[0]))
        if first is not None:
            _check_together(module, first, found[0], files, (update, embedding), options)
        else:
            first = files
        found.append((update, embedding))
    return found


def _check_together(
    module: str,
    first: PeftFiles,
    one: tuple[ScaledPair, bool],
    files: PeftFiles,
    other: tuple[ScaledPair, bool],
    options: MergeOptions,
) -> None:
    shapes = [(update.a.shape[1], update.b.shape[0], embedding) for update, embedding in (one, other)]
    if shapes[0] != shapes[1]:
        sizes = [f"{'an embedding' if flag else 'a layer'} from {a} to {b}" for a, b, flag in shapes]
        raise AdapterError(
            f"{module!r} is {sizes[0]} in {first.path} and {sizes[1]} in {files.path}: they were trained on different bases"
        )
    ranks = [update.a.shape[0] for update, _ in (one, other)]
    if options.needs_one_rank and ranks[0] != ranks[1]:
        raise AdapterError(
            f"{options.strategy!r} needs equal ranks, but {module!r} has rank {ranks[0]} in {first.path} and {ranks[1]} in "
            f"{files.path}",
            hint="'svd' and 'cat' take any ranks",
        )


def _shared_base(module: str, adapters: Sequence[PeftFiles]) -> Tensor | None:
    """The base's weight that PEFT may save beneath an update of an embedding; all must hold the same."""
    holders = [files for files in adapters if module in files.modules]
    weights = [files.modules[module].weight for files in holders]
    first = weights[0]
    for files, weight in zip(holders, weights, strict=True):
        if (weight is None) != (first is None) or (
            weight is not None
            and first is not None
            and not (weight.shape == first.shape and torch.equal(weight, first))
        ):
            raise AdapterError(
                f"{holders[0].path} and {files.path} do not hold the same base weight beneath {module!r}, so there is no one "
                "base for both",
                hint="save them with save_pretrained(..., save_embedding_layers=False) where the base was not changed",
            )
    return first


def _settings(adapters: Sequence[PeftFiles], ranks: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """The settings of the result, written anew: those of the first adapter may not hold for the others."""
    notes: list[str] = []
    agreed: dict[str, Any] = {}
    for name in ("base_model_name_or_path", "revision", "task_type"):
        said = list(dict.fromkeys(files.config.get(name) for files in adapters))
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
        "fan_in_fan_out": any(files.config.get("fan_in_fan_out") for files in adapters),
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
        f"base_model.model.{module}.{names[role]}": tensor.contiguous().clone()
        for module, tensors in files.modules.items()
        for role, tensor in tensors.items()
    }
