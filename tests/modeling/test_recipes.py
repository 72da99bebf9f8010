"""Every recipe of docs/recipes.md runs as it stands, and computes what transformers computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Olmo2Config,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForTokenClassification,
    Qwen3Config,
)
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.granite import modeling_granite as granite
from transformers.models.llama import modeling_llama as llama
from transformers.models.modernbert import modeling_modernbert as modernbert
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.phi import modeling_phi as phi
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

import lorax_core as lorax
from lorax_core.modeling import Model, ModelConfig, Rope, Task, read_rope
from lorax_core.modeling.batch import HeadRows, NoAdapters
from lorax_core.weights import WeightMap

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text(encoding="utf-8")
BEFORE = PAGE.partition("```python\n")[2].partition("```")[0]
RECIPES = dict(re.findall(r"^## ([^\n]+)\n.*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
NO_ADAPTERS = SimpleNamespace(adapters=NoAdapters())
TOKENS = 12


class Tiny(ModelConfig):
    """Enough of a configuration for a model around one block."""

    max_tokens = property(lambda self: 64)


def recipe(title, config):
    """The names that a recipe defines, for a configuration of transformers."""
    fields = config.to_dict()
    fields["head_dim"] = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    by_layer = "full_attention" in (fields.get("rope_parameters") or {})
    rope = None if by_layer else Rope(**read_rope(fields))
    names = {"config": SimpleNamespace(**fields, rope=rope, labels=("a", "b"), problem=None)}
    exec(compile(BEFORE + RECIPES[title], f"docs/recipes.md: {title}", "exec", dont_inherit=True), names)
    return names


def randomise(module):
    draw = torch.Generator().manual_seed(5)
    for numbers in module.parameters():
        numbers.data = torch.randn(numbers.shape, generator=draw) / numbers.shape[-1] ** 0.5
    return module.eval()


def filled(ours, theirs, rename=None):
    """Our block with the numbers of theirs, which has no parameter more and none less."""
    fuse = {"**.qkv_proj": ("q_proj", "k_proj", "v_proj"), "**.gate_up_proj": ("gate_proj", "up_proj")}
    names, found = WeightMap(rename=rename or {}, fuse=fuse), {}
    for name, numbers in randomise(theirs).named_parameters():
        target = names.resolve(name)
        found.setdefault(target.name, {})[target.part or 0] = numbers.data
    assert set(found) == {name for name, _ in ours.named_parameters()}
    for name, parts in found.items():
        ours.get_parameter(name).data = torch.cat([parts[part] for part in sorted(parts)])
    return ours


def rows(count=TOKENS, width=32):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def ours_of(block, x):
    """What a block makes of one text, as the engine would run it."""
    fields = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 32, "num_hidden_layers": 1}
    model = Model(Tiny(model_type="x", **fields), nn.ModuleList([block]), {}, dtype=torch.float32, device="cpu")
    return block(x, lorax.make_batch(model, [list(range(len(x)))]))


@torch.inference_mode()
def theirs_of(block, x, rotary, allowed=lambda query, key: key <= query):
    """What a block of transformers makes of it; `rotary` is its module, `allowed` which keys a query sees."""
    places = torch.arange(len(x))
    mask = torch.where(allowed(places[:, None], places[None]), 0.0, float("-inf"))[None, None]
    answer = block(x[None], position_embeddings=rotary(x[None], places[None]), attention_mask=mask)
    return (answer[0] if isinstance(answer, tuple) else answer)[0]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def head_rows(count):
    return HeadRows(None, (0,), (count,), torch.arange(count))


def test_every_recipe_is_tested_here():
    tested = re.findall(r'= recipe\(\s*"(.+?)"', Path(__file__).read_text(encoding="utf-8"))

    assert len(RECIPES) == len(re.findall("^## ", PAGE, re.MULTILINE))
    assert sorted(set(tested)) == sorted(RECIPES)


def test_recipes_are_short():
    code = {title: [line for line in text.splitlines() if line] for title, text in RECIPES.items()}

    assert {title: len(lines) for title, lines in code.items() if not 3 <= len(lines) <= 8} == {}


def test_a_norm_of_one_plus_weight_is_gemmas():
    config = Gemma2Config(**SIZES, head_dim=8)
    made = recipe("A norm that multiplies by 1 + weight", config)

    norm = filled(made["norm"](), gemma2.Gemma2RMSNorm(32, config.rms_norm_eps))

    theirs = randomise(gemma2.Gemma2RMSNorm(32, config.rms_norm_eps))
    assert_same(norm(rows(), NO_ADAPTERS), theirs(rows()))
    assert made["layer"].input_layernorm.offset == 1.0


def test_norms_in_other_places_are_olmo2s():
    config = Olmo2Config(**SIZES)
    made = recipe("Norms in other places", config)
    theirs = olmo2.Olmo2DecoderLayer(config, 0)

    layer = filled(made["layer"], theirs)

    assert_same(ours_of(layer, rows()), theirs_of(theirs, rows(), olmo2.Olmo2RotaryEmbedding(config)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_embeddings_are_gemmas(dtype):
    config = Gemma2Config(**SIZES, head_dim=8)
    made = recipe("Scaled embeddings", config)
    theirs = gemma2.Gemma2TextScaledWordEmbedding(32, 32, 0, embed_scale=32**0.5)

    table = filled(made["Backbone"](made["config"]).embed_tokens, theirs).to(dtype)

    ids = torch.tensor([3, 1, 7])
    assert torch.equal(table(ids, NO_ADAPTERS), theirs.to(dtype)(ids))


def test_capped_logits_are_gemmas():
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    made = recipe("Capped logits", config)
    theirs = Gemma2ForCausalLM(config).eval()
    theirs.lm_head.weight.data = rows(32)

    head = made["CappedHead"](made["config"])
    head.lm_head.weight.data = rows(32)

    ids = torch.arange(TOKENS)[None]
    with torch.inference_mode():
        hidden = theirs.model(ids).last_hidden_state[0]
        assert_same(head(hidden, head_rows(TOKENS)), theirs(ids).logits[0])
    assert head(100 * rows(), head_rows(TOKENS)).abs().max() <= 2.0


def test_capped_and_scaled_scores_are_gemmas():
    config = Gemma2Config(
        **SIZES, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=3, layer_types=["full_attention"] * 2
    )
    made = recipe("Capped and scaled scores", config)
    theirs = gemma2.Gemma2Attention(config, 0)

    attention = filled(made["attention"], theirs)

    assert_same(ours_of(attention, rows()), theirs_of(theirs, rows(), gemma2.Gemma2RotaryEmbedding(config)))


def test_norms_of_queries_and_keys_are_qwen3s():
    config = Qwen3Config(**SIZES, head_dim=16)
    made = recipe("Norms of queries and keys", config)
    theirs = qwen3.Qwen3Attention(config, 0)

    attention = filled(made["attention"], theirs)

    assert_same(ours_of(attention, rows()), theirs_of(theirs, rows(), qwen3.Qwen3RotaryEmbedding(config)))


def test_windows_go_by_the_layer():
    window = 4
    config = Qwen3Config(**SIZES, head_dim=8, layer_types=["sliding_attention", "full_attention"])
    config.sliding_window = window
    made = recipe("Windows by layer", config)
    rotary = llama.LlamaRotaryEmbedding(config)

    found = []
    for layer in made["layers"]:
        theirs = llama.LlamaAttention(LlamaConfig(**SIZES), 0)
        found.append((ours_of(filled(layer, theirs), rows()), theirs))

    (narrow, theirs), (wide, others) = found
    assert_same(narrow, theirs_of(theirs, rows(), rotary, lambda query, key: (key <= query) & (key > query - window)))
    assert_same(wide, theirs_of(others, rows(), rotary))
    assert not torch.allclose(narrow, wide)


@pytest.mark.parametrize("fraction", [None, 0.25])
def test_partial_rotary_is_phis(fraction):
    changes = {} if fraction is None else {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": fraction}}
    config = PhiConfig(**{**SIZES, "hidden_size": 64, **changes})
    made = recipe("Partial rotary", config)
    stated = config.to_dict()
    if fraction is None:
        del stated["rope_parameters"]
    theirs = phi.PhiAttention(config, 0)

    parsed = made["Config"].parse(stated)

    rotary = made["RotaryEmbedding"](16, parsed.rope)
    attention = made["RotaryAttention"](64, 4, 2, rotary=rotary, causal=True)
    filled(attention, theirs, {"dense.**": "o_proj.**"})
    x = rows(width=64)
    assert rotary.rotary_dim == 16 * (fraction or 0.5)
    assert_same(ours_of(attention, x), theirs_of(theirs, x, phi.PhiRotaryEmbedding(config)))


def test_biases_are_where_transformers_has_them():
    config = Qwen2Config(**SIZES, mlp_bias=True)
    made = recipe("Biases", config)
    theirs = llama.LlamaMLP(LlamaConfig(**SIZES, mlp_bias=True))

    gated = filled(made["gated"], theirs)
    attention = filled(made["attention"], qwen2.Qwen2Attention(config, 0))
    head = filled(made["BiasedHead"](made["config"]).lm_head, PhiForCausalLM(PhiConfig(**SIZES)).lm_head)

    assert_same(gated(rows(), NO_ADAPTERS), theirs(rows()))
    assert attention.o_proj.bias is None
    assert head.bias is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_needs_no_tensor(tied, tmp_path):
    config = Gemma2Config(**SIZES, head_dim=8, tie_word_embeddings=tied)
    made = recipe("Ties", config)
    stated = config.to_dict()
    if tied:
        del stated["tie_word_embeddings"]
    parsed = made["Config"].parse(stated)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    names = lorax_names(tmp_path)

    head = made["LanguageModelHead"].build(parsed, names, Task.GENERATE)

    assert head is not None
    assert ("lm_head.weight" in names) is not tied
    assert (made["weight_map"](parsed).tie == {"lm_head.weight": "embed_tokens.weight"}) is tied


def lorax_names(folder):
    """The tensors of a saved checkpoint, without the prefix."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name.removeprefix("model.") for name in file.keys()}  # noqa: SIM118


def test_a_head_called_score_is_qwen2s():
    config = Qwen2Config(**SIZES, num_labels=2)
    made = recipe("A head that is called score", config)
    theirs = Qwen2ForTokenClassification(config).score

    head = made["ScoreTokenHead"](made["config"])
    filled(head.score, theirs)

    assert_same(head(rows(), head_rows(TOKENS)), theirs(rows()))


def test_a_head_of_ones_own_is_granites():
    config = GraniteConfig(**SIZES, logits_scaling=8.0)
    made = recipe("A language-model head of one's own", config)
    theirs = GraniteForCausalLM(config).eval()

    head = made["ScaledHead"](made["config"])
    filled(head.lm_head, theirs.lm_head)

    ids = torch.arange(TOKENS)[None]
    with torch.inference_mode():
        assert_same(head(theirs.model(ids).last_hidden_state[0], head_rows(TOKENS)), theirs(ids).logits[0])


def test_a_layer_that_adds_otherwise_is_granites():
    config = GraniteConfig(**SIZES, residual_multiplier=0.22, attention_multiplier=8**-0.5)
    made = recipe("A layer that adds otherwise", config)
    theirs = granite.GraniteDecoderLayer(config, 0)
    rotary = made["RotaryEmbedding"](8, made["config"].rope)
    attention = made["RotaryAttention"](*made["sizes"], rotary=rotary, causal=True, bias=False)
    mlp = made["GatedMLP"](32, 48, "silu")

    layer = filled(made["ScaledLayer"](attention, mlp, lambda: made["RMSNorm"](32, config.rms_norm_eps)), theirs)

    assert_same(ours_of(layer, rows()), theirs_of(theirs, rows(), granite.GraniteRotaryEmbedding(config)))


def test_a_model_that_sees_both_sides_is_not_masked():
    config = LlamaConfig(**SIZES)
    made = recipe("A model that sees both sides", config)
    theirs = llama.LlamaAttention(config, 0)

    attention = filled(made["attention"], theirs)

    expected = theirs_of(
        theirs, rows(), llama.LlamaRotaryEmbedding(config), lambda query, key: (key == key) & (query == query)
    )
    assert_same(ours_of(attention, rows()), expected)
    assert made["ClassifierHead"].needed[0] == "pooler.dense.weight"


def test_normalised_embeddings_are_modernberts():
    config = ModernBertConfig(**SIZES)
    made = recipe("Normalised embeddings", config)
    theirs = modernbert.ModernBertEmbeddings(config)

    backbone = made["Backbone"](made["config"])
    for ours, their in ((backbone.embed_tokens, theirs.tok_embeddings), (backbone.embed_norm, theirs.norm)):
        filled(ours, their)
    backbone.norm.weight.data.fill_(1.0)

    ids = torch.tensor([3, 1, 7])
    batch = SimpleNamespace(input_ids=ids, adapters=NoAdapters())
    with torch.inference_mode():
        assert_same(backbone(batch), backbone.norm(theirs(ids), batch))


def test_rotary_bases_go_by_the_layer():
    config = ModernBertConfig(**SIZES, layer_types=["sliding_attention", "full_attention"], local_attention=128)
    made = recipe("Rotary bases by layer", config)
    rotary = modernbert.ModernBertRotaryEmbedding(config)

    for at, kind in enumerate(config.layer_types):
        theirs = modernbert.ModernBertAttention(config, at)
        layer = filled(made["layers"][at], theirs, {"Wqkv.**": "qkv_proj.**", "Wo.**": "o_proj.**"})
        expected = theirs_of(
            theirs,
            rows(),
            lambda x, places, kind=kind: rotary(x, places, kind),
            lambda query, key: (key == key) & (query == query),
        )
        assert_same(ours_of(layer, rows()), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_head_with_a_transform_is_modernberts(pooling):
    config = ModernBertConfig(**SIZES, classifier_pooling=pooling, classifier_bias=True, norm_bias=True)
    made = recipe("A head with a transform", config)
    theirs = ModernBertForSequenceClassification(config).eval()

    head = made["TransformHead"](made["config"])
    filled(head.transform, theirs.head)
    filled(head.classifier, theirs.classifier)

    ids = torch.arange(1, TOKENS + 1)
    with torch.inference_mode():
        hidden = theirs.model(ids[None]).last_hidden_state[0]
        read = hidden[list(head.span(ids.tolist(), 0))]
        assert_same(head(read, head_rows(len(read))), theirs(ids[None]).logits)
