"""What tiny models of transformers compute is seen by their numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lorax_core.errors import PluginError
from lorax_core.scaffold.blueprint import understand
from lorax_core.scaffold.errors import NotUnderstood
from lorax_core.scaffold.facts import find_facts
from lorax_core.scaffold.fields import bind
from lorax_core.scaffold.probe import Outcome, Probe
from lorax_core.scaffold.record import observe
from lorax_core.scaffold.source import Source, read_source
from lorax_core.scaffold.tiny import Tiny
from lorax_core.scaffold.write_modeling import modeling_text
from lorax_core.types import Task

SEEN = {
    "LlamaForCausalLM": {"norm_kind": "rms", "norms": "before", "gate": True, "kv_heads": 1, "rotary_dim": 64},
    "Qwen3ForCausalLM": {"qk_norm": "heads", "qkv_bias": False, "head_dim": 64},
    "Starcoder2ForCausalLM": {"norm_kind": "layer", "gate": False, "up_bias": True, "act": "gelu_pytorch_tanh"},
    "PhiForCausalLM": {"norms": "shared", "parallel": True, "head_bias": True, "rotary_dim": 32},
    "OlmoForCausalLM": {"norm_kind": "layer", "norm_weight": False, "norm_bias": False, "norm_eps": 1e-5},
    "Olmo2ForCausalLM": {"norms": "after", "qk_norm": "whole"},
    "Gemma2ForCausalLM": {
        "norms": "around", "norm_offset": 1.0, "scale": 1 / 16, "soft_cap": 50.0, "logit_cap": 30.0, "tied": True,
        "embed_scale": 128**0.5,
    },
    "OPTForCausalLM": {"rotary": False, "positions": 320, "position_offset": 2, "act": "relu", "qkv_bias": True},
    "GPT2LMHeadModel": {"qkv": "fused", "transposed": True, "position_offset": 0, "intermediate": 512},
    "GPTNeoXForCausalLM": {"qkv": "interleaved", "parallel": True, "norms": "before", "rotary_dim": 16},
    "Phi3ForCausalLM": {"qkv": "fused", "gate_up": "fused"},
    "BertModel": {"norms": "post", "causal": False, "types": 2, "positions": 320, "position_offset": 0},
    "RobertaModel": {"after_padding": True, "position_offset": None, "types": 2},
    "EuroBertModel": {"norms": "before", "causal": False, "rotary_dim": 64},
    "DistilBertModel": {"norms": "post", "types": None, "norm_eps": 1e-12, "act": "gelu"},
}  # fmt: skip


def see(tiny, **changes):
    config = tiny.config(**changes)
    return find_facts(observe(tiny.model(config), tiny.ids(config)), config)


@pytest.mark.parametrize(("name", "expected"), SEEN.items(), ids=SEEN)
def test_what_a_model_computes_is_seen(name, expected):
    source = read_source(f"transformers:{name}")
    if name.endswith("Model"):
        source = replace(source, classes={Task.EMBED: source.classes[Task.EMBED]})

    facts = see(Tiny(source)).flat()

    assert {fact: facts[fact] for fact in expected} == expected


def test_modules_have_the_names_of_the_file():
    names = see(Tiny(read_source("transformers:GPTNeoXForCausalLM"))).names

    assert names["layers.*.self_attn.qkv_proj"] == "layers.*.attention.query_key_value"
    assert names["norm"] == "final_layer_norm"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SmolLM3ForCausalLM", "layers differ in more than their windows: rotary"),
        ("CohereForCausalLM", "angles of positions that are not those of core's"),
    ],
)
def test_what_blocks_do_not_compute_is_said(name, told):
    with pytest.raises(NotUnderstood, match=told):
        Probe(Tiny(read_source(f"transformers:{name}"))).base()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("MambaConfig", "no num_attention_heads"),
        ("ModernBertModel", "norms of layers.0 in places"),
        ("MPNetModel", "relative_attention_bias holds a number for each head, as biases of relative positions do"),
    ],
)
def test_an_architecture_of_other_layers_is_refused(name, told):
    with pytest.raises((PluginError, NotUnderstood), match=told):
        understand(read_source(f"transformers:{name}"))


class HalvedConfig(LlamaConfig):
    model_type = "halved"
    slope: float = 1.0
    spare: float = 1.0


class HalvedForCausalLM(LlamaForCausalLM):
    """Llama, but for rows that are multiplied by a number of the configuration on their way to the head."""

    config_class = HalvedConfig

    def __init__(self, config):
        super().__init__(config)
        inner = self.lm_head.forward
        self.lm_head.forward = lambda hidden: inner(hidden) * config.slope


@pytest.fixture(scope="module")
def halved():
    classes = {Task.GENERATE: HalvedForCausalLM, Task.EMBED: LlamaModel}
    return understand(Source("halved", HalvedConfig, classes, (), {}))


def test_a_field_that_no_block_reads_is_refused_by_name_and_one_without_effect_is_not(halved):
    assert list(halved.refused) == ["slope"]
    assert halved.fields["spare"].inert


@pytest.mark.parametrize(
    ("changes", "spread"),
    [({}, None), ({"scale": 1.0}, 0.06), ({"scale": 0.25}, 0.12), ({"causal": False}, 0.1)],
)
def test_weights_of_the_kit_are_smaller_where_rounding_would_hide_what_is_computed(halved, changes, spread):
    plan = replace(halved, facts=replace(halved.facts, layer=replace(halved.facts.layer, **changes)))

    assert plan.tiny_config.get("initializer_range") == spread


def test_layers_that_add_are_those_of_a_decoder_in_an_encoder_too(halved):
    plan = replace(halved, facts=replace(halved.facts, layer=replace(halved.facts.layer, causal=False)))

    written = modeling_text(plan, "lorax_halved")

    assert "class HalvedBackbone(Decoder):" in written
    assert "causal=False" in written
    assert "def weight_map(config: ModelConfig) -> WeightMap:  # noqa: ARG004" in written
    assert "tie=" not in written


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": 0.5}, "scale becomes 0.5"),
        ({"kv_heads": 1, "soft_cap": 3.0}, "soft_cap becomes 3.0"),
        ({"norms": "after"}, "norms becomes 'after'"),
        ({}, "answers change, and nothing that core's blocks know of"),
        ({"heads": 4, "head_dim": 32, "kv_heads": 2, "scale": 32**-0.5}, None),
    ],
)
def test_a_field_decides_what_is_its_value_and_what_follows_from_that(changes, told):
    facts = see(Tiny(read_source("transformers:LlamaForCausalLM")))
    other = replace(facts, layer=replace(facts.layer, **changes), rotary_dim=changes.get("head_dim", 64))
    binds = {}

    problem = bind(binds, facts, 2, Outcome(None, other, None), 4)

    assert problem == told
    assert told is not None or binds == {"heads": "is"}


def test_the_same_tensors_have_the_same_numbers():
    tiny = Tiny(read_source("transformers:LlamaForCausalLM"))

    one, other = tiny.model(), tiny.model(tiny.config(rms_norm_eps=0.1))

    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True))
