"""The frequencies of rotary positions, by the type that a checkpoint names.

Decides how `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before) are read and what each type
computes, with the numbers of transformers. Knows nothing of how heads are turned; `rotary` does that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class Rope(BaseModel):
    """Rotary parameters of one model. `original_length` is the length that the base was trained for.

    Numbers for which transformers computes NaN, or no rotation at all, are refused.
    """

    # Frozen, so hashable: it is the key under which layers share angles. Unknown keys mean a scaling not computed here.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: Literal["default", "linear", "dynamic", "yarn", "llama3"] = "default"
    theta: PositiveFloat = 10000.0
    partial: float = Field(default=1.0, ge=0, le=1)
    factor: PositiveFloat | None = None
    original_length: int = Field(gt=0, lt=2**53)
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None
    attention_factor: PositiveFloat | None = None
    # 0 means unset in these.
    beta_fast: NonNegativeFloat | None = None
    beta_slow: NonNegativeFloat | None = None
    mscale: NonNegativeFloat | None = None
    mscale_all_dim: NonNegativeFloat | None = None
    truncate: bool = True

    @model_validator(mode="after")
    def _complete(self) -> Rope:
        missing = [name for name in _NEEDED[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rope type {self.type!r} needs {', '.join(missing)}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.type == "llama3" and low is not None and high is not None and low >= high:
            raise ValueError(f"low_freq_factor {low} is not below high_freq_factor {high}")
        return self

    @property
    def max_tokens(self) -> int | None:
        """Where positions end by their type. Past its length `dynamic` changes frequencies that cached keys were turned by."""
        return self.original_length if self.type == "dynamic" else None

    def frequencies(self, dim: int, device: str | torch.device | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies `[dim / 2]` in float32, and the factor on cos and sin.

        Operations stand in transformers' order, to the last bit: far out in a text an angle multiplies any difference.
        Raises ValueError where the parameters give no finite numbers for heads of `dim`.
        """
        if self.type == "yarn" and dim % 2:
            raise ValueError(f"rope type 'yarn' blends pairs of dimensions, and {dim} rotary dimensions are odd")
        try:
            inverse, factor = self._frequencies(dim, device)
        except ArithmeticError as error:  # yarn divides by the logarithm of theta, which is 0 for 1
            raise ValueError(f"rotary parameters ({self._stated()}) that cannot be computed: {error}") from error
        if not (inverse.isfinite().all() and math.isfinite(factor)):
            raise ValueError(f"rotary parameters ({self._stated()}) whose frequencies are not finite")
        return inverse, factor

    def _stated(self) -> str:
        fields = self.model_dump(exclude_none=True, exclude={"partial", "truncate"})
        return ", ".join(f"{name} {value}" for name, value in fields.items())

    def _frequencies(self, dim: int, device: str | torch.device | None) -> tuple[Tensor, float]:
        theta = self.theta
        if self.type == "dynamic":
            # What transformers computes up to the length that the base was trained for, where `max_tokens` ends sequences:
            # theta itself, unless the factor is so large that it rounds away.
            factor = self.factor or 1.0
            theta = theta * (factor - (factor - 1)) ** (dim / (dim - 2))
        # int64 first: transformers does so too, and a float32 arange could round differently.
        powers = theta ** (torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim)  # [dim / 2]
        inverse = 1.0 / powers
        match self.type:
            case "linear":
                return inverse / (self.factor or 1.0), 1.0
            case "llama3":
                return self._llama3(inverse), 1.0
            case "yarn":
                return self._yarn(powers, dim)
            case _:
                return inverse, 1.0

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long waves are slowed by `factor`, short ones kept, those between blended."""
        factor, low, high = self.factor or 1.0, self.low_freq_factor or 1.0, self.high_freq_factor or 1.0
        # [dim / 2] throughout.
        waves = 2 * math.pi / inverse  # tokens that one turn takes
        longest, shortest = self.original_length / low, self.original_length / high
        slowed = torch.where(waves > longest, inverse / factor, inverse)
        # 0 at the longest wave that is blended, 1 at the shortest.
        blend = (self.original_length / waves - low) / (high - low)
        blended = (1 - blend) * slowed / factor + blend * slowed
        return torch.where((waves >= shortest) & (waves <= longest), blended, slowed)

    def _yarn(self, powers: Tensor, dim: int) -> tuple[Tensor, float]:
        factor = self.factor or 1.0

        # Which pair of dimensions makes so many turns over the original length: the frequency formula solved for it.
        def dimension(turns: float) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        # 32 and 1 are the YaRN paper's, and transformers' defaults. `or` as there: 0 means unset.
        low, high = dimension(self.beta_fast or 32), dimension(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = (high - low) or 0.001  # one dimension wide: a step instead of a ramp
        ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=powers.device) - low) / width).clamp(0, 1)
        # Not simplified: `1 - kept` instead of `ramp` is transformers' order of rounding.
        kept = 1 - ramp
        scaled = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
        return scaled, self._yarn_attention(factor)

    def _yarn_attention(self, factor: float) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        # DeepSeek's two numbers; the stated factor above wins over them.
        if self.mscale and self.mscale_all_dim:
            return _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    # The temperature fit of the YaRN paper: 0.1 ln(s) + 1.
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(raw: Mapping[str, Any], *, theta: float = 10000.0, partial: float = 1.0) -> dict[str, Any]:
    """The fields of a `Rope` from a raw `config.json`; `theta` and `partial` are the architecture's defaults.

    Unknown keys are kept, so that validation names them: a scaling that is not understood must not be ignored.
    """
    # Not merged: where a file has both, transformers reads the old key alone.
    stated_in = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    found = raw.get(stated_in) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{stated_in} is {found!r:.60}, where an object belongs")
    nested = dict(found)
    kind = nested.pop("rope_type", None)
    old_kind = nested.pop("type", None)
    inner = nested.pop("original_max_position_embeddings", None)
    kind = kind or old_kind or "default"
    longest = raw.get("max_position_embeddings")
    # Phi-3 states it outside; transformers lets that win for every architecture.
    length = raw.get("original_max_position_embeddings", inner)
    # Some files state only the two lengths; transformers derives the factor so.
    if kind == "yarn" and nested.get("factor") is None and length and longest:
        nested["factor"] = longest / length
    # These know only one length, and `dynamic` ends at it.
    if kind in ("default", "linear", "dynamic"):
        length = longest
    if "truncate" in nested:
        nested["truncate"] = nested["truncate"] or False  # null is none of the default, which is true

    def stated(name: str, default: float) -> Any:
        # Popped, as what is left in `nested` goes to validation, which refuses unknown keys. `rope_theta` stood
        # outside in files of transformers 4.
        inner, outer = nested.pop(name, None), raw.get(name)
        return inner if inner is not None else outer if outer is not None else default

    fields = {
        "type": kind,
        "theta": stated("rope_theta", theta),
        "partial": stated("partial_rotary_factor", partial),
        "original_length": longest if length is None else length,
    }
    return {**fields, **{name: value for name, value in nested.items() if value is not None}}
