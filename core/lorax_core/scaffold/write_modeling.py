"""The text of a package's `modeling.py`: core's blocks, with the options that were observed.

Decides which argument is a field of the configuration and which is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from lorax_core.scaffold.blueprint import Blueprint
from lorax_core.scaffold.code import call, imported, literal
from lorax_core.scaffold.write_config import uses
from lorax_core.types import Task
from lorax_core.weights.mapping import WeightMap, post_norm_map

_BLOCKS: Final = (
    "Decoder", "DecoderLayer", "FirstTokenClassificationHead", "GatedMLP", "LanguageModelHead", "LayerNorm", "MLP",
    "Model", "ModelConfig", "PostNormEncoder", "RMSNorm", "RotaryAttention", "RotaryEmbedding", "SelfAttention", "Task",
    "TokenClassificationHead",
)  # fmt: skip
_SUMMARY: Final = {
    Task.GENERATE: ("ForCausalLM", "that generates"),
    Task.EMBED: ("ForEmbeddings", "for embeddings"),
    Task.TOKEN_CLASSIFICATION: ("ForTokenClassification", "that labels tokens"),
    Task.SEQUENCE_CLASSIFICATION: ("ForSequenceClassification", "that labels texts"),
}


def modeling_text(plan: Blueprint, package: str) -> str:
    """`modeling.py`."""
    stem = plan.source.stem
    backbone = _encoder(plan) if plan.post_norm else _backbone(plan)
    body = "\n\n\n".join(["\n".join(backbone), *_heads(plan), *_models(plan)])
    kind, other = ("encoder", "files, batching") if plan.encodes else ("decoder", "caches, files")
    lines = [
        f'"""{stem}: {summary(plan)}.',
        "",
        f"Decides what sets {stem} apart from core's {kind}. Knows nothing of {other} or adapters.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
    ]
    lines += ["from functools import partial", ""] if uses(body, "partial") else []
    imports = [
        imported("lorax_core.modeling", [name for name in _BLOCKS if uses(body, name)]),
        imported("lorax_core.weights", [name for name in ("WeightMap", "post_norm_map") if uses(body, name)]),
    ]
    ours = [imported(f"{package}.config", [f"{stem}Config"])] if uses(body, f"{stem}Config") else []
    # Imports are sorted by module, and a package's name may come before core's.
    if package.startswith("lorax_") or not ours:
        imports = sorted([*imports, *ours], key=lambda line: line.split()[1])
    else:
        imports = [*imports, "", *ours]
    return "\n".join([*lines, *imports, "", "", body, ""])


def summary(plan: Blueprint) -> str:
    """What kind of decoder or encoder it is, in a phrase."""
    if plan.post_norm:
        counted = "positions counted after the padding id" if plan.facts.after_padding else "learned positions"
        types = "token types" if plan.facts.types else "no token types"
        return f"an encoder with {counted}, {types} and norms after its residuals"
    layer, facts = plan.facts.layer, plan.facts
    traits = ["rotary positions" if layer.rotary else "learned positions"]
    traits += ["grouped queries"] if _kv_heads(plan) != "config.num_attention_heads" else []
    traits += ["norms of queries and keys"] if layer.qk_norm else []
    traits += {"around": ["norms around both blocks"], "after": ["norms after both blocks"]}.get(layer.norms, [])
    traits += ["blocks that read the same rows"] if layer.parallel else []
    traits += ["a gated feed-forward block"] if layer.gate else []
    traits += ["capped logits"] if facts.logit_cap else []
    traits = traits[:4]  # a line of text
    kind = "an encoder" if plan.encodes else "a decoder"
    return f"{kind} with " + (f"{', '.join(traits[:-1])} and {traits[-1]}" if len(traits) > 1 else traits[0])


def _value(plan: Blueprint, fact: str) -> str:
    """The expression for a fact: a field, one over the root of it, or a number that never changes."""
    decided = plan.decides(fact)
    if decided is None:
        return literal(plan.facts.flat()[fact])
    one, form = decided
    name = _common(plan, one.name)
    return f"config.{name}**-0.5" if form == "root" else f"config.{name}"


def _common(plan: Blueprint, name: str) -> str:
    """A field as `ModelConfig` calls it."""
    back = {plan.tiny.spelt(one): one for one in ("num_attention_heads", "num_key_value_heads", "hidden_size")}
    return back.get(name, name)


def _kv_heads(plan: Blueprint) -> str:
    return _value(plan, "kv_heads")


def _backbone(plan: Blueprint) -> Iterator[str]:
    layer, facts = plan.facts.layer, plan.facts
    stem = plan.source.stem
    yield f"class {stem}Backbone(Decoder):"
    yield '    """A batch to hidden rows `[tokens, hidden]`."""'
    yield ""
    yield f"    def __init__(self, config: {stem}Config) -> None:"
    yield "        hidden = config.hidden_size"
    yield from _norms(plan)
    if layer.rotary:
        yield "        # All layers rotate the same way, so one set of frequencies is enough."
        yield f"        rotary = RotaryEmbedding({_head_dim(plan)}, config.rope)"
    yield from _attention(plan)
    window = _window(plan)
    attend = call("attention", [f"window={window}"] if window else [])
    bias = _biases(plan)
    mlp = call(
        "GatedMLP" if layer.gate else "MLP", ["hidden", _value(plan, "intermediate"), _value(plan, "act"), *bias]
    )
    options = [f"norms={literal(layer.norms)}"] if layer.norms != "before" else []
    parallel = _value(plan, "parallel")
    options += [f"parallel={parallel}"] if parallel != "False" else []
    yield "        layers = ["
    yield call("DecoderLayer", [attend, mlp, "norm", *options], 12)
    loop = "layer" if window and "(layer)" in window else "_"
    yield f"            for {loop} in range(config.num_hidden_layers)"
    yield "        ]"
    more = ["config", "layers", "norm()"]
    if facts.positions is not None:
        more.append("max_positions=config.max_position_embeddings")
        more += [f"position_offset={facts.position_offset}"] if facts.position_offset else []
    scale = _embed_scale(plan)
    more += [f"embed_scale={scale}"] if scale else []
    yield call("super().__init__", more, 8)
    yield ""
    yield from _weight_map(plan)


def _encoder(plan: Blueprint) -> Iterator[str]:
    yield f"class {plan.source.stem}Backbone(PostNormEncoder):"
    yield '    """A batch to hidden rows `[tokens, hidden]`."""'
    yield ""
    yield from _weight_map(plan)


def _norms(plan: Blueprint) -> Iterator[str]:
    layer = plan.facts.layer
    kind = "RMSNorm" if layer.norm_kind == "rms" else "LayerNorm"
    options = [f"eps={_value(plan, 'norm_eps')}"]
    options += [f"offset={layer.norm_offset}"] if layer.norm_offset else []
    if kind == "LayerNorm":
        weight = _value(plan, "norm_weight")
        options += [f"weight={weight}"] if weight != "True" else []
        options += ["bias=False"] if layer.norm_weight and not layer.norm_bias else []
    if layer.qk_norm is None and plan.decides("qk_norm") is None:
        yield f"        norm = partial({kind}, hidden, {', '.join(options)})"
    else:
        yield f"        sized_norm = partial({kind}, {', '.join(options)})"
        yield "        norm = partial(sized_norm, hidden)"


def _head_dim(plan: Blueprint) -> str:
    return _value(plan, "head_dim") if plan.decides("head_dim") else "hidden // config.num_attention_heads"


def _attention(plan: Blueprint) -> Iterator[str]:
    layer = plan.facts.layer
    sizes = ["hidden", "config.num_attention_heads"]
    sizes += [_kv_heads(plan)] if _kv_heads(plan) != "config.num_attention_heads" or plan.decides("head_dim") else []
    sizes += [_head_dim(plan)] if plan.decides("head_dim") else []
    options = ["rotary=rotary"] if layer.rotary else []
    options.append(f"causal={layer.causal}")
    bias, out = _value(plan, "qkv_bias"), _value(plan, "out_bias")
    options += [f"bias={bias}"] if bias != "True" else []
    options += [f"out_bias={out}"] if out != bias else []
    scale = plan.decides("scale")
    if (scale is not None and "head_dim" not in scale[0].binds) or not _usual_scale(plan):
        options.append(f"scale={_value(plan, 'scale')}")
    cap = _value(plan, "soft_cap")
    options += [f"soft_cap={cap}"] if cap != "None" else []
    norm = plan.decides("qk_norm")
    if norm is not None:
        options.append(f"qk_norm=sized_norm if config.{norm[0].name} else None")
    elif layer.qk_norm:
        options.append("qk_norm=sized_norm")
    options += ["qk_norm_whole=True"] if layer.qk_norm == "whole" else []
    block = "RotaryAttention" if layer.rotary else "SelfAttention"
    yield call("attention = partial", [block, *sizes, *options], 8)


def _usual_scale(plan: Blueprint) -> bool:
    layer = plan.facts.layer
    return abs(layer.scale - layer.head_dim**-0.5) < 1e-9 or plan.decides("scale") is not None


def _window(plan: Blueprint) -> str | None:
    windows = plan.windows
    if windows is None:
        return None
    if windows.by_layer or (windows.gate and not windows.gate_clears):
        return "config.window(layer)"
    return f"config.{windows.field}"


def _biases(plan: Blueprint) -> list[str]:
    up, down = _value(plan, "up_bias"), _value(plan, "down_bias")
    usual = "False" if plan.facts.layer.gate else "True"
    return [f"bias={up}"] if up == down and up != usual else []


def _embed_scale(plan: Blueprint) -> str | None:
    decided, scale = plan.decides("embed_scale"), plan.facts.embed_scale
    if decided is not None:
        return _value(plan, "embed_scale")
    if scale == 1.0:
        return None
    return "hidden**0.5" if abs(scale - 128**0.5) < 1e-6 else literal(scale)


def _weight_map(plan: Blueprint) -> Iterator[str]:
    stem, layer = plan.source.stem, plan.facts.layer
    prefixes, renamed, fuse = _names(plan)
    ignored = [*(["**.rotary_emb.inv_freq"] if layer.rotary else []), *_old_buffers(plan), *plan.heads.ignored]
    # Where nothing is tied and nothing interleaved.
    unused = "  # noqa: ARG004" if plan.encodes and layer.qkv != "interleaved" else ""
    yield "    @staticmethod"
    yield f"    def weight_map(config: ModelConfig) -> WeightMap:{unused}"
    shown = f"with or without `{prefixes[0]}.`"
    yield f'        """Names as {stem}Model and its task models save them, {shown}."""'
    if plan.post_norm and _are_those_of_bert(plan, WeightMap(prefixes=prefixes, rename=renamed, fuse=fuse)):
        known = post_norm_map(prefixes[0]).ignore
        rest = [pattern for pattern in plan.heads.ignored if pattern not in known]
        if rest:
            yield "        # Heads that are not supported."
        yield call("return post_norm_map", map(literal, [prefixes[0], *rest]), 8)
        return
    yield "        return WeightMap("
    yield f"            prefixes={literal(prefixes)},"
    if renamed:
        yield f"            rename={literal(renamed, 12, 200)},"
    if fuse:
        yield f"            fuse={literal(fuse, 12, 200)},"
    if layer.transposed:
        yield '            transpose=("layers.*.self_attn.*.weight", "layers.*.mlp.*.weight"),'
    if layer.qkv == "interleaved":
        yield "            # Rows are stored (head, q|k|v, dim), and core's fused layer has (q|k|v, head, dim)."
        yield '            interleave={"layers.*.self_attn.qkv_proj": (config.num_attention_heads, 3)},'
    if not plan.encodes:
        yield '            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},'
    if ignored:
        old = ["frequencies that old checkpoints hold"] if layer.rotary else []
        old += ["numbers that old checkpoints hold"] if plan.encodes and _old_buffers(plan) else []
        why = ", and ".join([*old, *(["heads that are not supported"] if plan.heads.ignored else [])])
        yield f"            # {why[0].upper()}{why[1:]}."
        yield f"            ignore={literal(tuple(ignored), 12, 19)},"
    yield "        )"


def _names(plan: Blueprint) -> tuple[tuple[str, ...], dict[str, str], dict[str, tuple[str, ...]]]:
    """What a weight map says of names: prefixes, spellings, and the members of fused layers."""
    layer, names = plan.facts.layer, dict(plan.names)
    prefix = str(plan.source.classes[Task.EMBED].base_model_prefix)
    common = _shared({name for core, name in names.items() if core != "lm_head"})
    # Some classes have the base model under another name: Qwen3ForQuestionAnswering has it under `transformer`.
    kinds = (*plan.source.classes.values(), *plan.source.others)
    prefixes = list(dict.fromkeys([prefix, *(str(kind.base_model_prefix) for kind in kinds)]))
    if common:
        prefixes = [*(f"{one}.{common}" for one in prefixes), common, *prefixes]
        names = {core: name.removeprefix(f"{common}.") for core, name in names.items()}
    fuse: dict[str, tuple[str, ...]] = {}
    if layer.qkv == "apart":
        fuse["layers.*.self_attn.qkv_proj"] = ("q_proj", "k_proj", "v_proj")
    if layer.gate and layer.gate_up == "apart":
        fuse["layers.*.mlp.gate_up_proj"] = ("gate_proj", "up_proj")
    renamed = {f"{theirs}.**": f"{core}.**" for core, theirs in names.items() if core != theirs}
    return tuple(prefixes), renamed, fuse


def _old_buffers(plan: Blueprint) -> list[str]:
    """Counts that an encoder's model holds beside its tensors, and that it saved once."""
    model = plan.tiny.model(kind=plan.source.classes[Task.EMBED])
    return [name for name, one in model.named_buffers() if not one.is_floating_point()] if plan.encodes else []


def _are_those_of_bert(plan: Blueprint, names: WeightMap) -> bool:
    """Whether core's map for an encoder with BERT's names gives every tensor the place that `names` gives it."""
    model, bert = plan.tiny.model(kind=plan.source.classes[Task.EMBED]), post_norm_map(names.prefixes[0])
    return len(names.prefixes) == 1 and all(
        names.resolve(name) == bert.resolve(name) for name, _ in model.named_parameters()
    )


def _shared(names: set[str]) -> str:
    """The segment that all names begin with, if there is one."""
    first = {name.partition(".")[0] for name in names}
    return first.pop() if len(first) == 1 and all("." in name for name in names) else ""


def _heads(plan: Blueprint) -> Iterator[str]:
    stem = plan.source.stem
    decided, cap = plan.decides("logit_cap"), plan.facts.logit_cap
    if decided is not None or cap is not None or plan.facts.head_bias:
        what = " and ".join([*(["a bias"] if plan.facts.head_bias else []), *(["a cap"] if decided or cap else [])])
        lines = [f"class {stem}LanguageModelHead(LanguageModelHead):", f'    """Logits with {what}."""', ""]
        if plan.facts.head_bias:
            lines.append("    bias = True")
        if decided or cap:
            lines += [
                *([""] if plan.facts.head_bias else []),
                f"    def __init__(self, config: {stem}Config) -> None:",
                f"        super().__init__(config, soft_cap={_value(plan, 'logit_cap')})",
            ]
        yield "\n".join(lines)
    layer = plan.heads.layers.get(Task.TOKEN_CLASSIFICATION, "classifier")
    if layer != "classifier":
        yield (
            f"class {stem}TokenClassificationHead(TokenClassificationHead):\n"
            f'    """Labels of tokens; the layer is called `{layer}` in checkpoints."""\n\n    layer = {literal(layer)}'
        )
    pooled = plan.heads.pooled
    if pooled is not None:
        lines = [f"dense = {literal(pooled.dense)}", f"output = {literal(pooled.output)}"]
        lines += [f"act = {literal(pooled.act)}"] if pooled.act != "tanh" else []
        yield "\n".join(
            [
                f"class {stem}SequenceClassificationHead(FirstTokenClassificationHead):",
                f'    """Labels of a text: a dense layer with {pooled.act}, then the layer that gives them."""',
                "",
                *(f"    {line}" for line in lines),
            ]
        )


def heads(plan: Blueprint, package: str) -> dict[Task, str]:
    """The heads that a declaration names: those that differ from core's."""
    defined = "\n".join(_heads(plan))
    found = {}
    kinds = {
        Task.GENERATE: "LanguageModelHead",
        Task.TOKEN_CLASSIFICATION: "TokenClassificationHead",
        Task.SEQUENCE_CLASSIFICATION: "SequenceClassificationHead",
    }
    for task, name in kinds.items():
        if f"class {plan.source.stem}{name}" in defined:
            found[task] = f"{package}.modeling:{plan.source.stem}{name}"
    return found


def _models(plan: Blueprint) -> Iterator[str]:
    stem = plan.source.stem
    for task, (ending, what) in _SUMMARY.items():
        # A decoder is seldom loaded to classify without an engine.
        if task in plan.tasks and (plan.encodes or task in (Task.GENERATE, Task.EMBED)):
            yield f'class {stem}{ending}(Model):\n    """{stem} {what}."""\n\n    task = Task.{task.name}'
