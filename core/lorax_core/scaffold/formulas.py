"""Which formula of core gives the numbers that a module of transformers gave.

Decides by numbers alone: a formula fits when it gives the same but for rounding. Knows nothing of names or configurations.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.kernels.elementwise import READABLE, Angles
from lorax_core.modeling.activation import ACTIVATIONS
from lorax_core.scaffold.record import ModuleCall, same
from lorax_core.scaffold.tiny import WINDOW

_EPS = (1e-5, 1e-6, 1e-12, 1e-8, 0.0)


@dataclass(frozen=True)
class NormFormula:
    """A norm: its kind, what is added to its weight, whether it has a weight and a bias, and its epsilon."""

    kind: Literal["rms", "layer"]
    offset: float
    weight: bool
    bias: bool
    eps: float


@torch.inference_mode()
def norm_formula(call: ModuleCall, numbers: Iterable[float]) -> NormFormula | None:
    """The norm that a module is, None when it is none. `numbers` are those of the configuration, among them its epsilon."""
    x = call.given[0]
    if call.made[0].shape != x.shape or list(call.module.children()):
        return None
    own = dict(call.module.named_parameters())
    if set(own) - {"weight", "bias"} or any(one.shape != x.shape[-1:] for one in own.values()):
        return None
    weight, bias = own.get("weight"), own.get("bias")
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(x.shape, generator=draw) + 0.3
    # Small rows show the epsilon, which large ones hide.
    tried = [base, base * 1e-3, base * 1e-6]
    wanted = [call.module(one) for one in tried]
    for eps in dict.fromkeys([*(one for one in numbers if 0 <= one < 1), *_EPS]):
        for formula in _norms(weight, bias, eps):
            made = (_normed(formula, one, weight, bias) for one in tried)
            if all(same(one, other, 1e-4) for one, other in zip(wanted, made, strict=True)):
                return formula
    return None


def _norms(weight: Tensor | None, bias: Tensor | None, eps: float) -> Iterator[NormFormula]:
    yield NormFormula("layer", 0.0, weight is not None, bias is not None, eps)
    if weight is not None and bias is None:
        yield NormFormula("rms", 0.0, True, False, eps)
        yield NormFormula("rms", 1.0, True, False, eps)


def _normed(formula: NormFormula, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if formula.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, formula.eps)
    assert weight is not None
    return READABLE.rms_norm(x, weight, formula.eps, formula.offset)


@torch.inference_mode()
def activation(x: Tensor, y: Tensor, other: Tensor | None = None, preferred: Sequence[str] = ()) -> str | None:
    """The name of the activation with `act(x) * other == y`; of several, one that the configuration names."""
    found = [name for name, act in ACTIVATIONS.items() if same(y, act(x) if other is None else act(x) * other)]
    return next((name for name in found if name in preferred), found[0] if found else None)


@dataclass(frozen=True)
class Heads:
    """How many query and key heads, and how large they are."""

    heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True)
class AttentionFormula:
    """What attention does with queries, keys and values: `order` are the places of q, k and v among what it was given."""

    order: tuple[int, int, int]
    causal: bool
    rotary: bool
    scale: float
    soft_cap: float | None
    window: int | None


@torch.inference_mode()
def attention_formula(
    parts: Sequence[Tensor],
    context: Tensor,
    sizes: Heads,
    angles: Sequence[tuple[Tensor, Tensor]],
    numbers: Sequence[float],
    *,
    causal: bool,
) -> AttentionFormula | None:
    """The attention that makes `context` of three tensors `[tokens, heads, dim]`, two of them perhaps with fewer heads.

    It is `causal` or not. `numbers` are those of the configuration: scales, caps and windows are looked for among them.
    """
    positive = [one for one in numbers if one > 0]
    scales = list(
        dict.fromkeys(
            [sizes.dim**-0.5, 1.0, *(one**-0.5 for one in positive), *positive, *(1 / one for one in positive)]
        )
    )
    caps = [None, *(one for one in positive if 0.1 < one <= 1000)]
    windows = [None, *(int(one) + more for one in positive if one == int(one) and one <= WINDOW for more in (0, 1))]
    turns: list[tuple[Tensor, Tensor] | None] = [*angles, None]
    for first, second, third in itertools.permutations(range(3)):
        q, k, v = parts[first], parts[second], parts[third]
        if (q.shape[1], k.shape[1], v.shape[1]) != (sizes.heads, sizes.kv_heads, sizes.kv_heads):
            continue
        k, v = (one.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1) for one in (k, v))
        # The first row sees nothing but itself, which rules out most orders at once.
        if causal and not same(context[:1], v[:1].flatten(1), 1e-4):
            continue
        for turn in turns:
            scores = torch.einsum("ihd,jhd->hij", *_turned(q, k, turn))
            for cap, window in itertools.product(caps, windows):
                made = _attended(scores, v, scales, cap, window, causal)
                fitting = [scale for scale, rows in zip(scales, made, strict=True) if same(context, rows, 1e-4)]
                if fitting:
                    return AttentionFormula((first, second, third), causal, turn is not None, fitting[0], cap, window)
    return None


def _turned(q: Tensor, k: Tensor, turn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    if turn is None:
        return q, k
    half = turn[0].shape[-1] // 2
    cos, sin = (one[:, None, :half] for one in turn)  # [tokens, 1, half]; transformers repeats them
    return READABLE.rotate(q, k, Angles(cos, sin))


def _attended(
    scores: Tensor, v: Tensor, scales: Sequence[float], cap: float | None, window: int | None, causal: bool
) -> Tensor:
    """Rows `[scales, tokens, heads * dim]` of scores `[heads, tokens, tokens]`, under each of some scales."""
    scores = scores * torch.tensor(scales)[:, None, None, None]
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    at = torch.arange(scores.shape[-1])
    apart = at[:, None] - at[None, :]
    hidden = (apart < 0) if causal else torch.zeros_like(apart, dtype=torch.bool)
    if window is not None:
        hidden |= apart.abs() >= window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("shij,jhd->sihd", weights, v).flatten(2)


def weight_of(module: nn.Module) -> Tensor | None:
    """The matrix `[out, in]` of a linear layer, None for any other module; GPT-2's Conv1D stores it the other way round."""
    if isinstance(module, nn.Linear):
        return module.weight
    if type(module).__name__ == "Conv1D":
        stored = module.weight
        assert isinstance(stored, Tensor)
        return stored.t()
    return None
