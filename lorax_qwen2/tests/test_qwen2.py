"""Qwen2 of random numbers beside transformers, in every shape that a configuration can give it."""

from __future__ import annotations

import pytest
import torch
from builders import change_json, make_qwen2, make_qwen2_model
from rigs import all_logits, finish, make_loaded, make_loop, make_sequence

import lorax_core as lorax

PROMPTS = [[5, 9, 2, 77, 13], [300], [44, 3] * 30, list(range(100, 140))]
SHAPES = {
    "grouped heads": {},
    "as many key heads as heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "heads of another size than hidden gives": {"head_dim": 24},
    "wide heads, few": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 80},
    "tied": {"tie_word_embeddings": True},
    "one layer": {"num_hidden_layers": 1},
    "gelu": {"hidden_act": "gelu"},
    "a large epsilon": {"rms_norm_eps": 0.5},
    "another rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


@torch.inference_mode()
def oracle_logits(model):
    return [model(torch.tensor([ids])).logits[0] for ids in PROMPTS]


def assert_as_transformers(folder, host, model):
    for ours, theirs in zip(all_logits(make_loaded(folder, host), PROMPTS), oracle_logits(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_transformers(tmp_path, host, changes):
    folder = make_qwen2(tmp_path, tokenizer=False, **changes)

    assert_as_transformers(folder, host, make_qwen2_model(**changes))


@pytest.mark.parametrize(
    "changes", [SHAPES["one key head"], SHAPES["tied"], SHAPES["heads of another size than hidden gives"]]
)
def test_greedy_text_is_that_of_transformers(tmp_path, host, changes):
    base = make_loaded(make_qwen2(tmp_path, tokenizer=False, **changes), host)
    model = make_qwen2_model(**changes)

    found = finish(make_loop(base, page_size=16), *(make_sequence(ids, 100) for ids in PROMPTS))

    for tokens, ids in zip(found, PROMPTS, strict=True):
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert tokens == made[0, len(ids) :].tolist()


def test_an_old_configuration_means_what_a_new_one_says(tmp_path, host):
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "num_key_value_heads": 4}
    folder = make_qwen2(tmp_path, tokenizer=False, **changes)
    change_json(
        folder / "config.json",
        rope_parameters=None,
        rope_theta=500.0,
        dtype=None,
        torch_dtype="float32",
        layer_types=None,
        num_key_value_heads=None,  # then there are as many as heads
        head_dim=None,
    )

    assert_as_transformers(folder, host, make_qwen2_model(**changes))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_sliding_window_is_that_of_transformers(tmp_path, host, layer):
    changes = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": layer}
    folder = make_qwen2(tmp_path, tokenizer=False, **changes)

    assert_as_transformers(folder, host, make_qwen2_model(**changes))


def test_text_within_a_sliding_window_is_that_of_transformers(tmp_path, host):
    changes = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    base = make_loaded(make_qwen2(tmp_path, tokenizer=False, **changes), host)
    ids = PROMPTS[3]
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = torch.tensor([ids])
    expected = make_qwen2_model(**changes).generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    # Of 100 tokens the window leaves few pages: so few that all of them would not fit.
    [tokens] = finish(make_loop(base, pages=8, page_size=4, max_tokens=8), make_sequence(ids, 60))

    assert tokens == expected[0, len(ids) :].tolist()


def test_16_bit_logits_are_near_those_of_transformers_in_16_bit(tmp_path, host):
    folder = make_qwen2(tmp_path, tokenizer=False)
    model = make_qwen2_model().bfloat16()

    found = all_logits(make_loaded(folder, host, dtype=torch.bfloat16), PROMPTS)

    for ours, theirs in zip(found, oracle_logits(model), strict=True):
        scale = theirs.float().abs().max()
        assert (ours - theirs.float()).abs().max() < 0.05 * scale


@pytest.mark.parametrize(("field", "value"), [("hidden_size", None), ("num_attention_heads", "four"), ("head_dim", 0)])
def test_a_configuration_that_lacks_what_is_needed_is_refused_by_field(tmp_path, host, field, value):
    change_json(make_qwen2(tmp_path, tokenizer=False) / "config.json", **{field: value})

    with pytest.raises(lorax.CheckpointError) as caught:
        make_loaded(tmp_path, host)

    assert field in caught.value.message
    assert "lorax_qwen2" in caught.value.message
