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

_BLOCKS: Final = (
    "Decoder", "DecoderLayer", "GatedMLP", "LanguageModelHead", "LayerNorm", "MLP", "Model", "ModelConfig", "RMSNorm",
    "RotaryAttention", "RotaryEmbedding", "SelfAttention", "Task", "TokenClassificationHead",
)  # fmt: skip
_SUMMARY: Final = {
    Task.GENERATE: ("ForCausalLM", "that generates"),
    Task.EMBED: ("ForEmbeddings", "for embeddings"),
}


def modeling_text(plan: Blueprint, package: str) -> str:
    """`modeling.py`."""
    stem = plan.source.stem
    body = "\n\n\n".join(["\n".join(_backbone(plan)), *_heads(plan), *_models(plan)])
    ours = [name for name in _BLOCKS if uses(body, name)]
    head = [
        f'"""{stem}: {summary(plan)}.',
        "",
        f"Decides what sets {stem} apart from core's decoder. Knows nothing of caches, files or adapters.",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from functools import partial",
        "",
        imported("lorax_core.modeling", ours),
        "from lorax_core.weights import WeightMap",
        imported(f"{package}.config", [f"{stem}Config"]),
    ]
    # Imports are sorted by module, and a package's name may come before core's.
    imports = sorted(head[9:12], key=lambda line: line.split()[1])
    if not package.startswith("lorax_"):
        imports = [*head[9:11], "", head[11]]
    return "\n".join([*head[:9], *imports, "", "", body, ""])


def summary(plan: Blueprint) -> str:
    """What kind of decoder it is, in a phrase."""
    layer, facts = plan.facts.layer, plan.facts
    traits = ["rotary positions" if layer.rotary else "learned positions"]
    traits += ["grouped queries"] if _kv_heads(plan) != "config.num_attention_heads" else []
    traits += ["norms of queries and keys"] if layer.qk_norm else []
    traits += {"around": ["norms around both blocks"], "after": ["norms after both blocks"]}.get(layer.norms, [])
    traits += ["blocks that read the same rows"] if layer.parallel else []
    traits += ["a gated feed-forward block"] if layer.gate else []
    traits += ["capped logits"] if facts.logit_cap else []
    traits = traits[:4]  # a line of text
    return "a decoder with " + (f"{', '.join(traits[:-1])} and {traits[-1]}" if len(traits) > 1 else traits[0])


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
        yield "        # All layers rotate alike, so one set of frequencies is enough."
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
    options.append("causal=True")
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
    names = dict(plan.names)
    prefix = str(plan.source.classes[Task.EMBED].base_model_prefix)
    common = _shared({name for core, name in names.items() if core != "lm_head"})
    # Some classes have the base model under another name: Qwen3ForQuestionAnswering has it under `transformer`.
    kinds = (*plan.source.classes.values(), *plan.source.others)
    prefixes = list(dict.fromkeys([prefix, *(str(kind.base_model_prefix) for kind in kinds)]))
    if common:
        prefixes = [*(f"{one}.{common}" for one in prefixes), common, *prefixes]
        names = {core: name.removeprefix(f"{common}.") for core, name in names.items()}
    renamed = {f"{theirs}.**": f"{core}.**" for core, theirs in names.items() if core != theirs}
    yield "    @staticmethod"
    yield "    def weight_map(config: ModelConfig) -> WeightMap:"
    shown = f"with or without `{prefixes[0]}.`"
    yield f'        """Names as {stem}Model and its task models save them, {shown}."""'
    yield "        return WeightMap("
    yield f"            prefixes={literal(tuple(prefixes))},"
    if renamed:
        yield f"            rename={literal(renamed, 12, 200)},"
    fuse: dict[str, tuple[str, ...]] = {}
    if layer.qkv == "apart":
        fuse["layers.*.self_attn.qkv_proj"] = ("q_proj", "k_proj", "v_proj")
    if layer.gate and layer.gate_up == "apart":
        fuse["layers.*.mlp.gate_up_proj"] = ("gate_proj", "up_proj")
    if fuse:
        yield f"            fuse={literal(fuse, 12, 200)},"
    if layer.transposed:
        yield '            transpose=("layers.*.self_attn.*.weight", "layers.*.mlp.*.weight"),'
    if layer.qkv == "interleaved":
        yield "            # Rows are stored (head, q|k|v, dim), and core's fused layer has (q|k|v, head, dim)."
        yield '            interleave={"layers.*.self_attn.qkv_proj": (config.num_attention_heads, 3)},'
    yield '            tie={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},'
    ignored = [*(["**.rotary_emb.inv_freq"] if layer.rotary else []), *plan.ignored]
    if ignored:
        why = "Frequencies that old checkpoints hold" if layer.rotary else ""
        why += (", and h" if why else "H") + "eads that are not supported" if plan.ignored else ""
        yield f"            # {why}."
        yield f"            ignore={literal(tuple(ignored), 12, 19)},"
    yield "        )"


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
    layer = plan.heads.get(Task.TOKEN_CLASSIFICATION, "classifier")
    if layer != "classifier":
        yield (
            f"class {stem}TokenClassificationHead(TokenClassificationHead):\n"
            f'    """Labels of tokens; the layer is called `{layer}` in checkpoints."""\n\n    layer = {literal(layer)}'
        )


def heads(plan: Blueprint, package: str) -> dict[Task, str]:
    """The heads that a declaration names: those that differ from core's."""
    defined = "\n".join(_heads(plan))
    found = {}
    for task, name in ((Task.GENERATE, "LanguageModelHead"), (Task.TOKEN_CLASSIFICATION, "TokenClassificationHead")):
        if f"class {plan.source.stem}{name}" in defined:
            found[task] = f"{package}.modeling:{plan.source.stem}{name}"
    return found


def _models(plan: Blueprint) -> Iterator[str]:
    stem = plan.source.stem
    for task, (ending, what) in _SUMMARY.items():
        if task in plan.tasks:
            yield f'class {stem}{ending}(Model):\n    """{stem} {what}."""\n\n    task = Task.{task.name}'
