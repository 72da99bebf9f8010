"""What a decoder or an encoder computes, as far as core's blocks compute the same.

Decides it from observed passes of a tiny model, by numbers: every tensor that a layer made must be what a block of core makes
of what the layer was given. Whatever remains unexplained is said, and never left out. Knows no architecture by its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorax_core.modeling.rope import Rope, read_rope
from lorax_core.modeling.rotary import RotaryEmbedding
from lorax_core.scaffold.embeddings import EmbeddingFacts, find_embeddings
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.formulas import norm_formula
from lorax_core.scaffold.layers import LayerFacts, find_layer, match
from lorax_core.scaffold.record import Record, same


@dataclass(frozen=True)
class Facts:
    """What was observed. `layer` is common to all layers but for `windows`; `rotary_dim` is None without rotary positions.

    `position_offset` is the row of a learned table for position 0, None where positions are counted `after_padding`. `types` is
    how many token types there are. `names` maps core's modules to those of the architecture, with `*` for the number of a
    layer; `beside` are modules that hidden rows do not depend on.
    """

    layer: LayerFacts
    windows: tuple[int | None, ...]
    rotary_dim: int | None
    positions: int | None
    position_offset: int | None
    after_padding: bool
    types: int | None
    embed_scale: float
    logit_cap: float | None
    head_bias: bool
    tied: bool
    names: Mapping[str, str]
    beside: tuple[str, ...]

    def flat(self) -> dict[str, Any]:
        """Every fact by its name."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "layer"}
        return {**{one.name: getattr(self.layer, one.name) for one in fields(self.layer)}, **found}


@torch.inference_mode()
def find_facts(record: Record, config: Any) -> Facts:
    """What the observed model computes; raises NotUnderstood for what core's blocks do not."""
    base = cast("nn.Module", record.model.base_model)
    numbers, words = _values(config)
    prefix = next(name for name, module in record.model.named_modules() if module is base)
    stem = _layers(record, base, config)
    found: list[LayerFacts] = []
    windows: list[int | None] = []
    names: dict[str, str] = {}
    angles, rotary_dim = _angles(record, config)
    for at in range(int(config.num_hidden_layers)):
        # Causal first, which one row decides: looking for what is not takes long.
        causal = found[0].causal if found else True
        try:
            layer, window, inner = find_layer(record, f"{stem}.{at}", config, numbers, words, angles, causal=causal)
        except NotUnderstood as error:
            raise NotUnderstood([*error.problems, *_biases(record.model, config)]) from error
        found.append(layer)
        windows.append(window)
        names |= {f"layers.*.{core}": f"{stem}.*.{theirs}" for core, theirs in inner.items()}
    if any(layer != found[0] for layer in found):
        raise NotUnderstood([f"layers differ in more than their windows: {_difference(found)}"])
    layer = found[0]
    first, last = record.of(f"{stem}.0"), record.of(f"{stem}.{len(found) - 1}")
    assert first is not None
    assert last is not None
    embedded = find_embeddings(record, config, first.x, stem, numbers)
    names |= _embedding_names(embedded, layer) | _last_norm(record, last.y, layer, numbers, stem)
    cap, head_bias, tied, head = _head(record, numbers)
    names |= head
    beside = () if layer.norms != "post" else _after(record, f"{stem}.{len(found) - 1}")
    _claim(record.model, {*names.values(), *beside})
    names = {core: theirs.removeprefix(f"{prefix}.") if prefix else theirs for core, theirs in names.items()}
    return Facts(
        layer,
        tuple(windows),
        rotary_dim if layer.rotary else None,
        embedded.positions,
        embedded.position_offset,
        embedded.after_padding,
        embedded.types,
        embedded.scale,
        cap,
        head_bias,
        tied,
        names,
        beside,
    )


def _values(config: Any) -> tuple[list[float], list[str]]:
    """Numbers and words of a configuration, among which epsilons, caps, scales and activations are looked for."""
    values = config.to_dict().values()
    numbers = [float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
    return list(dict.fromkeys(numbers)), [one for one in values if isinstance(one, str)]


def _layers(record: Record, base: nn.Module, config: Any) -> str:
    """The name of the list of layers."""
    names = {module: name for name, module in record.model.named_modules()}
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == config.num_hidden_layers
        and _called(record, names[module])
    ]
    lists = [one for one in lists if not any(one is not other and one in set(other.modules()) for other in lists)]
    if len(lists) != 1:
        raise NotUnderstood([f"{len(lists)} lists of num_hidden_layers layers, where there must be one"])
    return str(names[lists[0]])


def _called(record: Record, name: str) -> bool:
    return record.of(f"{name}.0") is not None


def _angles(record: Record, config: Any) -> tuple[list[tuple[Tensor, Tensor]], int | None]:
    """The angles that core makes for this configuration, where the model has a module that makes the same."""
    calls = [call for call in record.calls if "inv_freq" in dict(call.module.named_buffers()) and len(call.made) == 2]
    if not calls:
        return [], None
    theirs = cast("tuple[Tensor, Tensor]", tuple(one[0] for one in calls[0].made))
    dim = theirs[0].shape[-1]
    try:
        rope = Rope.model_validate(read_rope(config.to_dict()))
        ours = RotaryEmbedding(dim, rope.model_copy(update={"partial": 1.0}))
    except (ValueError, TypeError, AttributeError) as error:
        raise NotUnderstood([f"rotary parameters that core does not compute: {str(error).splitlines()[0]}"]) from error
    made = ours.angles(torch.arange(len(theirs[0])), torch.float32)
    doubled = [torch.cat((one[:, 0], one[:, 0]), dim=-1) for one in (made.cos, made.sin)]
    if not all(same(one, other) for one, other in zip(theirs, doubled, strict=True)):
        raise NotUnderstood(
            ["angles of positions that are not those of core's RotaryEmbedding for these rotary parameters"]
        )
    if any(not same(calls[0].made[0], call.made[0]) for call in calls):
        raise NotUnderstood(["several rotary embeddings in one model"])
    return [theirs], dim


def _embedding_names(found: EmbeddingFacts, layer: LayerFacts) -> dict[str, str]:
    """Core's names of tables: those of a `PostNormEncoder`, which has a norm of their sum, or of a `Decoder` without one."""
    if layer.norms == "post":
        if found.norm != layer.norm_formula:
            raise NotUnderstood(
                [f"the norm of embeddings, {found.norm}, is another than those of layers, {layer.norm_formula}"]
            )
        core = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
        theirs = (found.words, found.table, found.type_table, found.norm_name)
        return {f"embeddings.{name}": one for name, one in zip(core, theirs, strict=True) if one is not None}
    if found.norm is not None:
        raise NotUnderstood(
            [f"{found.norm_name} normalises embeddings, before layers that add to what they were given"]
        )
    return {"embed_tokens": found.words, **({} if found.table is None else {"embed_positions": found.table})}


def _last_norm(record: Record, y: Tensor, layer: LayerFacts, numbers: list[float], stem: str) -> dict[str, str]:
    if layer.norms == "post":
        if not same(record.hidden, y):
            raise NotUnderstood(["hidden rows are not those of the last layer"])
        return {}
    outside = [call for call in record.calls if not call.name.startswith(f"{stem}.")]
    call = match(outside, x=y, y=record.hidden)
    formula = norm_formula(call, numbers) if call is not None else None
    if call is None or formula is None:
        raise NotUnderstood(["no norm between the last layer and the hidden rows"])
    if formula != layer.norm_formula:
        raise NotUnderstood([f"the last norm, {formula}, is another than those of layers, {layer.norm_formula}"])
    return {"norm": call.name}


def _head(record: Record, numbers: list[float]) -> tuple[float | None, bool, bool, dict[str, str]]:
    """The cap of logits, whether the head has a bias and whether it is tied, and its name."""
    head = record.model.get_output_embeddings()  # type: ignore[operator]
    if record.logits is None or head is None:
        return None, False, False, {}
    names = {module: name for name, module in record.model.named_modules()}
    raw = nn.functional.linear(record.hidden, head.weight, head.bias)
    tied = head.weight is record.model.get_input_embeddings().weight  # type: ignore[operator]
    for cap in (None, *(one for one in numbers if one > 0)):
        if same(record.logits, raw if cap is None else cap * torch.tanh(raw / cap)):
            return cap, head.bias is not None, tied, {"lm_head": names[head]}
    raise NotUnderstood(["logits that are neither the head's nor those under a cap that the configuration states"])


def _claim(model: nn.Module, known: Collection[str]) -> None:
    """Every parameter must be one of a module that a block of core stands for."""
    for name, _ in model.named_parameters():
        module = ".".join("*" if part.isdigit() else part for part in name.split(".")[:-1])
        if module not in known:
            raise NotUnderstood([f"the tensor {name!r} is of no block that was recognised"])


def _after(record: Record, last: str) -> tuple[str, ...]:
    """Modules that are called after the last layer: what makes hidden rows is known, so they make something else of them."""
    end = max(at for at, call in enumerate(record.calls) if call.name == last)
    later = [call for call in record.calls[end + 1 :] if list(call.module.parameters(recurse=False))]
    return tuple(dict.fromkeys(call.name for call in later))


def _biases(model: nn.Module, config: Any) -> list[str]:
    """Tables with a number for each head: what a layer reads beside its rows."""
    heads = int(config.num_attention_heads)
    tables = [
        name for name, one in model.named_modules() if isinstance(one, nn.Embedding) and one.embedding_dim == heads
    ]
    return [f"{name} holds a number for each head, as biases of relative positions do" for name in tables]


def _difference(found: list[LayerFacts]) -> str:
    one = next(other for other in found if other != found[0])
    changed = [each.name for each in fields(one) if getattr(one, each.name) != getattr(found[0], each.name)]
    return ", ".join(changed)
