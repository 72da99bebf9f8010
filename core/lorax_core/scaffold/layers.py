"""What one layer of a decoder or an encoder computes: the places of its norms, its attention, its feed-forward block.

Decides by following tensors: which module was given what another one gave, and which formula of core makes one of the other.
Knows nothing of configurations beyond the numbers and words that they state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.formulas import (
    AttentionFormula,
    Heads,
    NormFormula,
    activation,
    attention_formula,
    norm_formula,
    weight_of,
)
from lorax_core.scaffold.record import ModuleCall, Record, rows, same

QKV = Literal["apart", "fused", "interleaved"]


@dataclass(frozen=True)
class LayerFacts:
    """What every layer of a model has in common.

    `norms` are those of `DecoderLayer`, or `post`, of the sum after each block (BERT). `qk_norm` says whether queries and keys
    have norms, of single `heads` or of the `whole` projection; `qkv` and `gate_up` how projections are stored.
    """

    norm_kind: Literal["rms", "layer"]
    norm_offset: float
    norm_weight: bool
    norm_bias: bool
    norm_eps: float
    norms: Literal["before", "shared", "after", "around", "post"]
    parallel: bool
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    rotary: bool
    scale: float
    soft_cap: float | None
    qk_norm: Literal["heads", "whole"] | None
    qkv: QKV
    qkv_bias: bool
    out_bias: bool
    gate: bool
    gate_up: Literal["apart", "fused"]
    act: str
    up_bias: bool
    down_bias: bool
    intermediate: int
    transposed: bool

    @property
    def norm_formula(self) -> NormFormula:
        """The formula that all norms have."""
        return NormFormula(self.norm_kind, self.norm_offset, self.norm_weight, self.norm_bias, self.norm_eps)


@dataclass
class _Parts:
    """The calls inside of one layer."""

    whole: ModuleCall
    calls: list[ModuleCall]
    norms: list[tuple[ModuleCall, NormFormula]]
    linears: list[ModuleCall]

    def norm(self, x: Tensor | None = None, y: Tensor | None = None) -> ModuleCall | None:
        return match([call for call, _ in self.norms], x=x, y=y)


def match(calls: Iterable[ModuleCall], x: Tensor | None = None, y: Tensor | None = None) -> ModuleCall | None:
    """The first call that was given `x` and gave `y`."""
    for call in calls:
        if (x is None or _equal(call.x, x)) and (y is None or _equal(call.y, y)):
            return call
    return None


def find_layer(
    record: Record,
    name: str,
    config: Any,
    numbers: Sequence[float],
    words: Sequence[str],
    angles: Sequence[tuple[Tensor, Tensor]],
    *,
    causal: bool,
) -> tuple[LayerFacts, int | None, dict[str, str]]:
    """The facts of one layer, its window, and core's names of its modules with those that they have in it.

    Where attention may be `causal` or not, deep in an encoder whose rows became the same, it is what is given.
    """
    whole = record.of(name)
    assert whole is not None
    calls = record.below(name)
    found = [(call, norm_formula(call, numbers)) for call in calls]
    norms = [(call, formula) for call, formula in found if formula is not None]
    linears = [call for call in calls if weight_of(call.module) is not None]
    parts = _Parts(whole, calls, norms, linears)
    if not norms:
        raise NotUnderstood([f"{name} has no norm that core computes"])
    attention = _attention(parts, name)
    inside = [call for call in linears if call.name.startswith(f"{attention.name}.")]
    outside = [call for call in linears if call not in inside]
    mlp, mlp_names, read, made = _mlp(outside, words)
    post = _post_norms(parts, attention, inside[-1].y, read, made)
    places, place_names = post or _places(parts, attention, read, made)
    attended, window, attention_names = _heads(parts, attention, inside, config, numbers, angles, causal)
    used = set(place_names.values()) | set(attention_names.values())
    formulas = {formula for call, formula in norms if call.name in used}
    if len(formulas) != 1:
        raise NotUnderstood([f"norms of several kinds in {name}: {', '.join(map(str, sorted(formulas, key=str)))}"])
    formula = formulas.pop()
    layer = LayerFacts(
        **{f"norm_{key}": value for key, value in vars(formula).items()},
        **places,
        **attended,
        **mlp,
        transposed=any(type(call.module).__name__ == "Conv1D" for call in linears),
    )
    names = {**place_names, **attention_names, **mlp_names}
    return layer, window, {core: theirs.removeprefix(f"{name}.") for core, theirs in names.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    return same(one.reshape(other.shape), other) if one.numel() == other.numel() else False


def _attention(parts: _Parts, name: str) -> ModuleCall:
    """The child that has the projections of queries, keys and values: the one whose rows depend on other rows."""
    children = [call for call in parts.calls if call.name.count(".") == name.count(".") + 1]
    for call in children:
        inside = [one for one in parts.linears if one.name.startswith(f"{call.name}.")]
        # Rows of the last projection are not made of the first one's alone: a feed-forward block's are, by an activation.
        if len(inside) in (2, 4) and _mixes(inside):
            return call
    raise NotUnderstood(
        [f"no child of {name} is attention with projections of queries, keys and values in one or three"]
    )


def _mixes(inside: Sequence[ModuleCall]) -> bool:
    *ahead, last = inside
    pair = [ahead[0].y, ahead[-1].y] if len(ahead) > 1 else list(ahead[0].y.chunk(2, dim=-1))
    plain = activation(ahead[0].y, last.x) if len(ahead) == 1 and ahead[0].y.shape == last.x.shape else None
    gated = None
    if pair[0].shape == pair[1].shape == last.x.shape:
        gated = activation(pair[0], last.x, pair[1]) or activation(pair[1], last.x, pair[0])
    return plain is None and gated is None


def _mlp(linears: Sequence[ModuleCall], words: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], Tensor, Tensor]:
    """The feed-forward block: its facts, its names, what it read and what it made."""
    if len(linears) not in (2, 3):
        raise NotUnderstood([f"a feed-forward block of {len(linears)} linear layers, where core's have 2 or 3"])
    *ahead, down = linears
    facts: dict[str, Any] = {"gate": True, "gate_up": "apart", "intermediate": down.x.shape[-1]}
    act: str | None = None
    names = {"mlp.down_proj": down.name}
    if len(ahead) == 2:
        for gate, up in (tuple(ahead), tuple(reversed(ahead))):
            act = act or activation(gate.y, down.x, up.y, words)
            if act is not None and len(names) == 1:
                names |= {"mlp.gate_proj": gate.name, "mlp.up_proj": up.name}
    elif ahead[0].y.shape == down.x.shape:
        act = activation(ahead[0].y, down.x, None, words)
        facts["gate"] = False
        names["mlp.up_proj"] = ahead[0].name
    else:
        gate_rows, up_rows = ahead[0].y.chunk(2, dim=-1)
        act = activation(gate_rows, down.x, up_rows, words) if gate_rows.shape == down.x.shape else None
        facts["gate_up"] = "fused"
        names["mlp.gate_up_proj"] = ahead[0].name
    if act is None:
        raise NotUnderstood(["a feed-forward block that is neither down(act(up(x))) nor down(act(gate(x)) * up(x))"])
    biases = {_bias(call) for call in ahead}
    if len(biases) > 1 or not _equal(ahead[0].x, ahead[-1].x):
        raise NotUnderstood(["gate and up of a feed-forward block differ in what they read, or in their biases"])
    return {**facts, "act": act, "up_bias": biases.pop(), "down_bias": _bias(down)}, names, ahead[0].x, down.y


def _post_norms(
    parts: _Parts, attention: ModuleCall, attended: Tensor, read: Tensor, made: Tensor
) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Norms of the sum after each block, None where there are none; the module of attention may hold the first of them."""
    x, y = parts.whole.x, parts.whole.y
    attended, read, made = (one.reshape(x.shape) for one in (attended, read, made))
    first = parts.norm(x=x + attended)
    last = parts.norm(x=first.y + made, y=y) if first is not None else None
    if first is None or last is None or not _equal(attention.x, x) or not _equal(read, first.y):
        return None
    names = {"post_attention_layernorm": first.name, "post_mlp_layernorm": last.name}
    return {"norms": "post", "parallel": False}, names


def _places(parts: _Parts, attention: ModuleCall, read: Tensor, made: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
    """Where norms are, and that the layer adds attention and feed-forward to what it was given."""
    x, y = parts.whole.x, parts.whole.y
    read, made = (one.reshape(x.shape) for one in (read, made))
    before = parts.norm(x=x, y=attention.x)
    after = parts.norm(x=attention.y)
    middle = x + (after.y if after else attention.y)
    after_mlp = parts.norm(x=made)
    total = middle + (after_mlp.y if after_mlp else made)
    before_mlp = parts.norm(x=middle, y=read)
    beside = match([call for call, _ in parts.norms if call is not before], x=x, y=read)
    if not same(y, total, 1e-4):
        raise NotUnderstood(
            [f"{parts.whole.name} does not add its attention and its feed-forward block to what it was given"]
        )
    places: dict[str, Any] = {"parallel": False}
    names: dict[str, ModuleCall | None] = {}
    match (before, after, before_mlp, after_mlp):
        case (ModuleCall(), None, ModuleCall(), None):
            places["norms"] = "before"
            names = {"input_layernorm": before, "post_attention_layernorm": before_mlp}
        case (ModuleCall(), None, None, None) if _equal(read, attention.x):
            places |= {"norms": "shared", "parallel": True}
            names = {"input_layernorm": before}
        case (ModuleCall(), None, None, None) if beside is not None:
            places |= {"norms": "before", "parallel": True}
            names = {"input_layernorm": before, "post_attention_layernorm": beside}
        case (None, ModuleCall(), None, ModuleCall()) if _equal(attention.x, x) and _equal(read, middle):
            places["norms"] = "after"
            names = {"post_attention_layernorm": after, "post_feedforward_layernorm": after_mlp}
        case (ModuleCall(), ModuleCall(), ModuleCall(), ModuleCall()):
            places["norms"] = "around"
            names = {
                "input_layernorm": before,
                "post_attention_layernorm": after,
                "pre_feedforward_layernorm": before_mlp,
                "post_feedforward_layernorm": after_mlp,
            }
        case _:
            raise NotUnderstood([f"norms of {parts.whole.name} in places that are not recognised"])
    return places, {core: call.name for core, call in names.items() if call is not None}


def _heads(
    parts: _Parts,
    attention: ModuleCall,
    inside: Sequence[ModuleCall],
    config: Any,
    numbers: Sequence[float],
    angles: Sequence[tuple[Tensor, Tensor]],
    likely: bool,
) -> tuple[dict[str, Any], int | None, dict[str, str]]:
    """Attention's facts, its window and its names."""
    *ahead, out = inside
    context, heads = out.x, int(config.num_attention_heads)
    dim = context.shape[-1] // heads
    rest = [sum(call.y.shape[-1] for call in ahead) - context.shape[-1]]
    kv_heads = rest[0] // (2 * dim)
    sizes = Heads(heads, kv_heads, dim)
    for causal, (qkv, stored) in itertools.product((likely, not likely), list(_splits(ahead, sizes))):
        normed, qk_norm, names = _qk_norms(parts, attention, stored, sizes)
        formula = attention_formula(normed, context, sizes, angles, numbers, causal=causal)
        if formula is None:
            continue
        if len({_bias(call) for call in ahead}) > 1:
            raise NotUnderstood(["of the projections of queries, keys and values, some have a bias"])
        facts = {
            "heads": heads, "kv_heads": kv_heads, "head_dim": dim, "causal": formula.causal, "rotary": formula.rotary,
            "scale": formula.scale, "soft_cap": formula.soft_cap, "qk_norm": qk_norm, "qkv": qkv,
            "qkv_bias": _bias(ahead[0]), "out_bias": _bias(out),
        }  # fmt: skip
        return facts, formula.window, {**names, **_projections(formula, qkv, ahead), "self_attn.o_proj": out.name}
    raise NotUnderstood(
        [f"{attention.name} is not softmax(q k^T * scale) v of its projections, with or without rotary positions"]
    )


def _projections(formula: AttentionFormula, qkv: QKV, ahead: Sequence[ModuleCall]) -> dict[str, str]:
    if qkv != "apart":
        return {"self_attn.qkv_proj": ahead[0].name}
    return {f"self_attn.{name}_proj": ahead[at].name for name, at in zip("qkv", formula.order, strict=True)}


def _splits(ahead: Sequence[ModuleCall], sizes: Heads) -> Iterable[tuple[QKV, list[Tensor]]]:
    """The ways in which projections may hold q, k and v, each `[tokens, heads, dim]`."""
    if len(ahead) == 3:
        yield "apart", [_split(call.y, sizes) for call in ahead]
        return
    whole = ahead[0].y
    counts = [sizes.heads, sizes.kv_heads, sizes.kv_heads]
    yield "fused", list(torch.split(_split(whole, sizes), counts, dim=1))
    if sizes.heads == sizes.kv_heads:
        yield "interleaved", list(whole.reshape(len(whole), sizes.heads, 3, sizes.dim).unbind(2))


def _split(x: Tensor, sizes: Heads) -> Tensor:
    return x.reshape(len(x), -1, sizes.dim)


def _qk_norms(
    parts: _Parts, attention: ModuleCall, stored: Sequence[Tensor], sizes: Heads
) -> tuple[list[Tensor], Literal["heads", "whole"] | None, dict[str, str]]:
    """Queries and keys as their norms give them, where they have some."""
    inside = [call for call, _ in parts.norms if call.name.startswith(f"{attention.name}.")]
    made = list(stored)
    kind: Literal["heads", "whole"] | None = None
    names: dict[str, str] = {}
    for at, name in ((0, "q"), (1, "k")):
        for call in inside:
            x, y = call.given[0], call.made[0]
            heads = x.shape[-1] == sizes.dim and x.ndim == 4
            if heads and x.shape[1] == stored[at].shape[1] and x.shape[2] == len(stored[at]):
                x, y = x.transpose(1, 2), y.transpose(1, 2)
            if call.name not in names.values() and _equal(rows(x).reshape(len(stored[at]), -1), stored[at].flatten(1)):
                made[at] = rows(y).reshape(stored[at].shape)
                kind = "heads" if heads else "whole"
                names[f"self_attn.{name}_norm"] = call.name
                break
    if len(names) == 1:
        raise NotUnderstood(["a norm of queries alone, or of keys alone"])
    return made, kind, names


def _bias(call: ModuleCall) -> bool:
    return isinstance(getattr(call.module, "bias", None), torch.Tensor)
