"""Which tensor of a checkpoint goes where.

Decides from the headers of its files alone: names, shapes and types. Takes no memory for numbers, so that a configuration
whose sizes are not the file's is refused before anything of its size is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from math import prod

from torch import nn

from lorax_core.errors import listed, nearest
from lorax_core.modeling.attention import Attention
from lorax_core.modeling.model import Model
from lorax_core.weights.checkpoint import FLOATS, StoredTensor
from lorax_core.weights.mapping import Target, WeightMap

_SHOWN = 8  # tensors that do not fit, in an error


@dataclass
class Account:
    """Which tensors went where. `problems` are sentences; a checkpoint without any is whole."""

    filled: int = 0
    ignored: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        problems = list(self.misfits)
        if self.missing:
            problems.append(f"missing from the checkpoint: {listed(self.missing)}")
        if self.unused:
            # A tensor without a place beside a place without a tensor is most often one misspelt rename of a plugin.
            close = nearest(self.unused[0], self.missing)
            hint = f"; {self.unused[0]!r} may be meant as {close!r}" if close else ""
            problems.append(f"no parameter takes: {listed(self.unused)}{hint}")
        return problems

    @property
    def summary(self) -> str:
        """The problems as one sentence; of tensors that do not fit, the first few."""
        more = len(self.misfits) - _SHOWN
        if more <= 0:
            return "; ".join(self.problems)
        others = self.problems[len(self.misfits) :]
        return "; ".join([*self.misfits[:_SHOWN], f"and {more} more tensors that do not fit", *others])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: into a parameter, or as a number to an attribute of an attention layer."""

    target: Target
    scale: tuple[Attention, str] | None = None


@dataclass
class Placement:
    """The places by the tensors' names in the files; `ties` are parameters without numbers of their own, to their sources."""

    account: Account
    places: dict[str, Place]
    ties: dict[str, str]


def place_tensors(
    model: Model, stored: Mapping[str, StoredTensor], weight_map: WeightMap, spare: Set[str]
) -> Placement:
    """A place for each tensor, and the account of those without. Parameters of `spare` may be stored and have none."""
    account, places = Account(), dict[str, Place]()
    parameters = model.named_tensors()
    wanted = _wanted(model, parameters, weight_map)
    scales = _scale_places(model)
    filled: dict[object, str] = {}
    for name, header in stored.items():
        scale = scales.get(weight_map.canonical(name))
        target = weight_map.resolve(name)
        key = scale or (target.name, target.part)
        if scale is None and key not in wanted:
            # Ignored ones are reported by `models check`; unused ones stop loading, as a plugin has forgotten them.
            known = target.name in spare or weight_map.ignores(name) or _is_spare_tie(target, weight_map, parameters)
            (account.ignored if known else account.unused).append(name)
            continue
        if key in filled:
            account.misfits.append(f"{name!r} and {filled[key]!r} are the same parameter {target.name!r}")
            continue
        # Of a misfit too, or the same tensor would be reported as missing as well.
        filled[key] = name
        misfit = _scale_misfit(header) if scale else _misfit(header, _shape(model, parameters, target))
        if misfit:
            account.misfits.append(f"{name!r} {misfit}")
        else:
            places[name] = Place(target, scale)
    # Last: a head that the files store wins over the tie.
    ties = _ties(weight_map, parameters, filled, account)
    account.filled = len(filled) + len(ties)
    account.missing = [_spelt(weight_map, *key) for key in wanted if key not in filled and key[0] not in ties]
    return Placement(account, places, ties)


def _wanted(
    model: Model, parameters: Mapping[str, nn.Parameter], weight_map: WeightMap
) -> dict[tuple[str, int | None], None]:
    """Every piece that a checkpoint must fill, in order: a parameter, or each part of one that is fused from several."""
    wanted: dict[tuple[str, int | None], None] = {}
    for name in parameters:
        module = name.rpartition(".")[0]
        # Members of the map, not parts of the layer: GPT-2 and NeoX store q, k, v as one tensor.
        parts = len(weight_map.members(module)) if module in model.sites else 1
        wanted |= dict.fromkeys([(name, part) for part in range(parts)] if parts > 1 else [(name, None)])
    return wanted


def _scale_places(model: Model) -> dict[str, tuple[Attention, str]]:
    """Where the scales of an 8-bit cache go, by the names that checkpoints with such scales use."""
    places: dict[str, tuple[Attention, str]] = {}
    for path, module in model.backbone.named_modules():
        if isinstance(module, Attention):
            parent = path.rpartition(".")[0]
            for scale in ("k_scale", "v_scale"):
                # Files agree on no place: the attention module, `attn` below it, or k_proj and v_proj.
                for name in (f"{parent}.{scale}", f"{parent}.attn.{scale}", f"{parent}.{scale[0]}_proj.{scale}"):
                    places[name] = (module, scale)
    return places


def _shape(model: Model, parameters: Mapping[str, nn.Parameter], target: Target) -> tuple[int, ...]:
    """The shape that the file must have for a target."""
    shape = tuple(parameters[target.name].shape)
    if target.part is not None:
        site = model.sites[target.name.rpartition(".")[0]]
        shape = (site.parts[target.part], *shape[1:])  # rows of this member in the fused [sum(parts), in]
    return shape[::-1] if target.transpose else shape


def _misfit(stored: StoredTensor, shape: tuple[int, ...]) -> str | None:
    if stored.shape != shape:
        return f"has shape {list(stored.shape)} where the configuration asks for {list(shape)}"
    if stored.dtype not in FLOATS:
        return f"holds {stored.dtype} where one of {', '.join(FLOATS)} is needed"
    return None


def _scale_misfit(stored: StoredTensor) -> str | None:
    if prod(stored.shape) != 1:
        return f"has shape {list(stored.shape)} where one number is needed"
    return _misfit(stored, stored.shape)


def _ties(
    weight_map: WeightMap, parameters: Mapping[str, nn.Parameter], filled: Mapping[object, str], account: Account
) -> dict[str, str]:
    ties: dict[str, str] = {}
    for name, source in weight_map.tie.items():
        source = ties.get(source, source)
        if name not in parameters or (name, None) in filled or (source, None) not in filled:
            continue
        ties[name] = source
        if parameters[name].shape != parameters[source].shape:
            shapes = [list(parameters[one].shape) for one in (name, source)]
            account.misfits.append(
                f"{name!r} of shape {shapes[0]} shares the numbers of {source!r} of shape {shapes[1]}"
            )
    return ties


def _is_spare_tie(target: Target, weight_map: WeightMap, parameters: Mapping[str, nn.Parameter]) -> bool:
    """A tied weight that the file stores as well, for a head that this model does not have."""
    return target.name in weight_map.tie and target.name not in parameters


def _spelt(weight_map: WeightMap, name: str, part: int | None) -> str:
    """A missing tensor under the name that checkpoints give it."""
    module, _, leaf = name.rpartition(".")
    stored = name if part is None else f"{weight_map.members(module)[part]}.{leaf}"
    return weight_map.stored_name(stored)
