from __future__ import annotations

import pytest
import torch
from builders import change_json, change_tensors, make_bert, make_qwen2, make_qwen2_model
from oracles import make_model, saved
from rigs import Bench, make_loaded
from transformers import BertForMaskedLM, GPT2LMHeadModel, GPTNeoXForCausalLM, Qwen2Model

from lorax_core.errors import CheckpointError, PluginError
from lorax_core.modeling import Linear
from lorax_core.types import Task
from lorax_core.weights.check import check_checkpoint

IDS = [5, 9, 2, 77, 13, 5, 100]


def make_changed(folder, change, make=make_qwen2):
    """A checkpoint whose tensors went through `change`."""
    change_tensors(make(folder, tokenizer=False) / "model.safetensors", change)
    return folder


def make_gpt2(folder, *, tokenizer=False):
    sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
    return saved(make_model(GPT2LMHeadModel, sizes), folder)


def make_neox(folder, *, tokenizer=False):
    sizes = {"vocab_size": 96, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 3}
    return saved(make_model(GPTNeoXForCausalLM, sizes, intermediate_size=96, max_position_embeddings=64), folder)


def refusal(folder, host):
    with pytest.raises(CheckpointError) as caught:
        make_loaded(folder, host)
    # The same account is what `lorax models check` tells, there without an exception.
    report = check_checkpoint(folder, host)
    assert not report.ok
    named = [problem in caught.value.message for problem in report.problems]
    assert all(named[:8])
    assert all(named) or f"and {named.count(False)} more" in caught.value.message
    return caught.value.message


def hidden(folder, host):
    bench = Bench(make_loaded(folder, host))
    return bench.hidden((bench.sequence(IDS), 0, len(IDS)))[0]


def renamed(rename):
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def test_a_missing_tensor_is_named_as_the_checkpoint_would_spell_it(tmp_path, host):
    lost = "model.layers.1.self_attn.k_proj.bias"
    make_changed(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != lost})

    message = refusal(tmp_path, host)

    assert "missing from the checkpoint: 'layers.1.self_attn.k_proj.bias'" in message


def test_a_tensor_that_no_parameter_takes_is_named(tmp_path, host):
    make_changed(tmp_path, lambda tensors: {**tensors, "model.layers.0.self_attn.rotary.cache": torch.ones(2)})

    message = refusal(tmp_path, host)

    assert "no parameter takes: 'model.layers.0.self_attn.rotary.cache'" in message


def test_a_misspelt_tensor_is_told_with_the_one_that_is_missing(tmp_path, host):
    make_changed(tmp_path, renamed(lambda name: name.replace("layers.0.mlp.down_proj", "layers.0.mlp.downproj")))

    message = refusal(tmp_path, host)

    assert "'model.layers.0.mlp.downproj.weight' may be meant as 'layers.0.mlp.down_proj.weight'" in message


def test_one_layer_too_many_is_not_left_out_in_silence(tmp_path, host):
    change_json(make_qwen2(tmp_path) / "config.json", num_hidden_layers=1, layer_types=None)

    message = refusal(tmp_path, host)

    assert "no parameter takes: 'model.layers.1." in message
    assert "(and " in message


def test_one_parameter_under_two_spellings_is_refused_with_both(tmp_path, host):
    make_changed(tmp_path, lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"]})

    message = refusal(tmp_path, host)

    assert "'norm.weight'" in message
    assert "'model.norm.weight'" in message
    assert "the same parameter" in message


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model.norm.weight", lambda t: t[:-1], "has shape [63] where the configuration asks for [64]"),
        ("model.layers.0.self_attn.v_proj.weight", lambda t: t.t(), "has shape [64, 32]"),
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.masked_fill(t == t.max(), torch.nan),
            "holds NaN or infinite",
        ),
        ("model.embed_tokens.weight", lambda t: t.masked_fill(t == t.max(), torch.inf), "holds NaN or infinite"),
        ("model.layers.0.input_layernorm.weight", lambda t: t.int(), "holds I32"),
        ("lm_head.weight", lambda t: t > 0, "holds BOOL"),
        ("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn), "holds F8_E4M3"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_what_is_wrong(tmp_path, host, name, change, told):
    make_changed(tmp_path, lambda tensors: {**tensors, name: change(tensors[name])})

    message = refusal(tmp_path, host)

    assert f"{name!r} {told}" in message


OTHER_SHAPES = {
    "a number": lambda t: t.flatten()[0],
    "flat": lambda t: t.flatten(),
    "one more dimension": lambda t: t[None],
    "three dimensions": lambda t: t.reshape(-1, 1, 1),
    "a row too many": lambda t: torch.cat((t, t[:1])),
    "nothing": lambda t: t[:0],
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_qwen2, "model.layers.0.self_attn.k_proj.weight"),  # fused
        (make_qwen2, "model.layers.0.self_attn.k_proj.bias"),
        (make_qwen2, "model.layers.1.mlp.gate_proj.weight"),
        (make_qwen2, "model.norm.weight"),
        (make_bert, "embeddings.word_embeddings.weight"),
        (make_gpt2, "transformer.h.0.attn.c_attn.weight"),  # transposed
        (make_gpt2, "transformer.h.1.mlp.c_fc.bias"),
        (make_neox, "gpt_neox.layers.0.attention.query_key_value.weight"),  # interleaved
        (make_neox, "gpt_neox.layers.0.attention.query_key_value.bias"),
    ],
)
def test_a_tensor_of_any_other_shape_is_named_with_both(tmp_path, host, make, name, shape):
    seen = []

    def change(tensors):
        seen.append(tensors[name])
        return {**tensors, name: OTHER_SHAPES[shape](tensors[name])}

    make_changed(tmp_path, change, make)
    found, known = list(OTHER_SHAPES[shape](seen[0]).shape), list(seen[0].shape)

    if found == known:
        make_loaded(tmp_path, host)
    else:
        expected = f"{name!r} has shape {found} where the configuration asks for {known}"
        assert expected in refusal(tmp_path, host)


@pytest.mark.parametrize(
    ("dtype", "number", "into", "told"),
    [
        (torch.float64, 1e300, torch.float32, "1e+300, which become infinite in float32: no dtype"),
        (torch.float64, -1e300, torch.float32, "1e+300, which become infinite in float32: no dtype"),
        (torch.float64, 1e39, torch.float32, "1e+39, which become infinite in float32: no dtype"),
        (torch.float32, 1e6, torch.float16, "1e+06, which become infinite in float16: load it with dtype='float32' or"),
        (torch.bfloat16, -1e6, torch.float16, "which become infinite in float16: load it with dtype='float32' or"),
        (torch.float32, torch.nan, torch.float16, "holds NaN or infinite numbers"),
        (torch.bfloat16, torch.inf, torch.float32, "holds NaN or infinite numbers"),
    ],
)
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.weight", "model.norm.weight"])
def test_a_number_that_becomes_infinite_is_refused_with_what_holds_it(tmp_path, host, name, dtype, number, into, told):
    def change(tensors):
        spoilt = tensors[name].to(dtype)
        spoilt.view(-1)[-1] = number
        return {**tensors, name: spoilt}

    make_changed(tmp_path, change)

    with pytest.raises(CheckpointError) as caught:
        make_loaded(tmp_path, host, dtype=into)

    assert f"{name!r} " in caught.value.message
    assert told in caught.value.message


def test_a_number_that_the_dtype_holds_is_kept(tmp_path, host):
    make_changed(
        tmp_path, lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"].double() + 1e6}
    )

    for dtype in (torch.float32, torch.bfloat16):
        assert make_loaded(tmp_path, host, dtype=dtype).model.sites["norm"].dense_weight().min() > 9e5


def test_numbers_are_looked_at_although_a_shape_is_wrong(tmp_path, host):
    def change(tensors):
        return {
            **tensors,
            "model.norm.weight": tensors["model.norm.weight"] * torch.nan,
            "lm_head.weight": tensors["lm_head.weight"][1:],
        }

    make_changed(tmp_path, change)

    message = refusal(tmp_path, host)

    assert "'model.norm.weight' holds NaN" in message
    assert "'lm_head.weight' has shape" in message


SCALE = "model.layers.0.self_attn.k_proj.k_scale"


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (torch.ones(2), "has shape [2] where one number is needed"),
        (torch.ones(0), "has shape [0] where one number is needed"),
        (torch.ones(4, 16), "has shape [4, 16] where one number is needed"),
        (torch.tensor(2), "holds I64"),
        (torch.tensor(torch.nan), "is nan"),
        (torch.tensor(torch.inf), "is inf"),
        (torch.tensor(0.0), "is 0.0"),
        (torch.tensor([-1.0]), "is -1.0"),
    ],
)
def test_a_scale_of_the_cache_is_one_number_above_zero(tmp_path, host, scale, told):
    make_changed(tmp_path, lambda tensors: {**tensors, SCALE: scale})

    assert f"{SCALE!r} {told}" in refusal(tmp_path, host)


def test_a_scale_of_the_cache_is_stored_once(tmp_path, host):
    other = "model.layers.0.self_attn.attn.k_scale"
    make_changed(tmp_path, lambda tensors: {**tensors, SCALE: torch.ones(1), other: torch.ones(())})

    message = refusal(tmp_path, host)

    assert repr(SCALE) in message
    assert repr(other) in message


def test_every_problem_is_told_at_once(tmp_path, host):
    def change(tensors):
        del tensors["model.norm.weight"]
        return {**tensors, "extra": torch.ones(1), "lm_head.weight": tensors["lm_head.weight"][:, :3]}

    make_changed(tmp_path, change)

    message = refusal(tmp_path, host)

    assert all(part in message for part in ("'norm.weight'", "'extra'", "has shape [320, 3]"))


def test_a_sound_checkpoint_is_accounted_for(qwen2, host):
    report = check_checkpoint(qwen2, host)

    assert report.ok
    assert report.problems == report.ignored == []
    assert report.tasks == ["generate", "embed"]
    assert report.parameters == sum(tensor.numel() for tensor in make_qwen2_model().parameters())
    assert report.dtype == "float32"
    assert report.to_json()["model_type"] == "qwen2"


def test_a_checkpoint_with_its_prefix_and_one_without_are_the_same_model(tmp_path, host):
    make_qwen2(tmp_path / "with", tokenizer=False)
    make_changed(tmp_path / "without", renamed(lambda name: name.removeprefix("model.")))

    assert torch.equal(hidden(tmp_path / "with", host), hidden(tmp_path / "without", host))


def test_berts_old_names_of_norms_and_its_prefix_are_understood(tmp_path, host):
    make_bert(tmp_path / "new", tokenizer=False)

    def old(name):
        return "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    make_changed(tmp_path / "old", renamed(old), make_bert)

    assert torch.equal(hidden(tmp_path / "new", host), hidden(tmp_path / "old", host))


def test_parts_of_a_task_model_that_embedding_does_not_need_are_reported_as_ignored(tmp_path, host, bert):
    change_json(bert / "config.json")  # as it is
    BertForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path)

    report = check_checkpoint(tmp_path, host)

    assert report.ok
    assert report.ignored
    assert all(name.startswith("cls.") for name in report.ignored)


def test_tied_weights_are_filled_from_each_other(tmp_path, host):
    make_qwen2(tmp_path, tie_word_embeddings=True)

    model = make_loaded(tmp_path, host).model

    assert torch.equal(model.sites["lm_head"].dense_weight(), model.sites["embed_tokens"].dense_weight())


def test_tied_weights_that_the_file_stores_as_well_are_taken(tmp_path, host):
    make_qwen2(tmp_path, tie_word_embeddings=True)
    change_tensors(
        tmp_path / "model.safetensors",
        lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]},
    )

    model = make_loaded(tmp_path, host).model

    assert torch.equal(model.sites["lm_head"].dense_weight(), model.sites["embed_tokens"].dense_weight())


def test_a_checkpoint_without_output_weights_embeds_and_does_not_generate(tmp_path, host):
    Qwen2Model(make_qwen2_model().config).save_pretrained(tmp_path)

    base = make_loaded(tmp_path, host)

    assert base.model.tasks == (Task.EMBED,)
    assert base.default_task is Task.EMBED


def test_a_checkpoint_that_says_untied_and_has_no_output_weights_is_refused_when_it_claims_to_generate(tmp_path, host):
    make_changed(tmp_path, lambda tensors: {name: t for name, t in tensors.items() if name != "lm_head.weight"})

    base = make_loaded(tmp_path, host)

    assert Task.GENERATE not in base.model.tasks


@pytest.mark.parametrize(
    ("stated", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)]
)
def test_the_dtype_is_the_one_that_the_configuration_states(tmp_path, host, stated, dtype):
    change_json(make_qwen2(tmp_path) / "config.json", dtype=stated)

    assert make_loaded(tmp_path, host).model.dtype is dtype


def test_the_dtype_may_be_overridden(qwen2, host):
    model = make_loaded(qwen2, host, dtype=torch.bfloat16).model

    assert {tensor.dtype for tensor in model.named_tensors().values()} == {torch.bfloat16}
    assert {s.dense_weight().dtype for s in model.sites.values() if isinstance(s, Linear)} == {torch.bfloat16}


def test_a_dtype_that_is_not_served_is_refused_with_those_that_are(tmp_path, host):
    change_json(make_qwen2(tmp_path) / "config.json", dtype="int8")

    with pytest.raises(CheckpointError, match=r"'int8'.*'float32', 'bfloat16', 'float16'"):
        make_loaded(tmp_path, host)


def test_an_unknown_model_type_is_refused_with_the_nearest(tmp_path, host):
    change_json(make_qwen2(tmp_path) / "config.json", model_type="qwen_2")

    with pytest.raises(PluginError) as caught:
        make_loaded(tmp_path, host)

    assert "'qwen_2'" in caught.value.message
    assert "'qwen2'" in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 0), ("hidden_size", -64), ("intermediate_size", "many"), ("vocab_size", None)],
)
@pytest.mark.parametrize("make", [make_qwen2, make_bert])
def test_a_configuration_that_cannot_be_is_refused_by_its_field(tmp_path, host, make, field, value):
    change_json(make(tmp_path) / "config.json", **{field: value})

    with pytest.raises(CheckpointError) as caught:
        make_loaded(tmp_path, host)

    assert field in caught.value.message


def test_a_configuration_of_another_size_names_the_tensors_that_do_not_fit(tmp_path, host):
    change_json(make_bert(tmp_path) / "config.json", hidden_size=128)

    message = refusal(tmp_path, host)

    assert (
        "'embeddings.word_embeddings.weight' has shape [200, 64] where the configuration asks for [200, 128]" in message
    )


WINDOWS = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}


@pytest.mark.parametrize(
    ("make", "changes", "told"),
    [
        (make_qwen2, {**WINDOWS, "sliding_window": 0}, "a window of 0"),
        (make_qwen2, {**WINDOWS, "sliding_window": -8}, "a window of -8"),
        (make_qwen2, {"rms_norm_eps": -1e-6}, "an eps of -1e-06"),
        (make_qwen2, {"rope_scaling": {"type": "linear", "factor": 1e-320}}, "frequencies are not finite"),
        (make_bert, {"layer_norm_eps": -1.0}, "an eps of -1.0"),
        (make_gpt2, {"layer_norm_epsilon": -1.0}, "an eps of -1.0"),
        (make_neox, {"layer_norm_eps": -1.0}, "an eps of -1.0"),
    ],
)
def test_a_block_that_cannot_be_made_is_told_of_the_configuration(tmp_path, host, make, changes, told):
    change_json(make(tmp_path) / "config.json", **changes)

    with pytest.raises(CheckpointError, match=f"no model can be built from: .*{told}") as caught:
        make_loaded(tmp_path, host)

    assert "config.json" in caught.value.hint
