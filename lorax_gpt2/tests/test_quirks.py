from __future__ import annotations

import pytest
import torch
from builders import make_lora, with_lora
from oracles import (
    TEXTS,
    add_tensors,
    assert_same,
    difference,
    installed,
    make_model,
    our_hidden,
    ours,
    rename_tensors,
    saved,
    their_hidden,
    their_logits,
)
from rigs import all_logits, make_adapters
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

import lorax_core as lorax
from lorax_core.errors import CapacityError, CheckpointError
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import assemble
from lorax_gpt2.config import GPT2Config as OurConfig
from lorax_gpt2.modeling import FlashGPT2ForCausalLM, FlashGPT2ForEmbeddings

GPT2 = {
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_gpt2(folder, kind=GPT2LMHeadModel, seed=0, **changes):
    """A random GPT-2 of transformers, and its files."""
    model = make_model(kind, GPT2, seed, **changes)
    return model, saved(model, folder)


def account(folder):
    return assemble(Checkpoint(folder), installed(), None, "cpu")[1]


def test_a_file_may_have_the_prefix_or_not(tmp_path):
    model, folder = make_gpt2(tmp_path)

    rename_tensors(folder, lambda name: name.removeprefix("transformer."))

    assert_same(our_hidden(ours(folder)), their_hidden(model))


def test_masks_of_old_files_are_ignored(tmp_path):
    model, folder = make_gpt2(tmp_path)
    mask = torch.ones(1, 1, 64, 64).tril()
    old = {f"transformer.h.{layer}.attn.bias": mask for layer in range(2)}
    old |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}

    add_tensors(folder, **old)

    assert sorted(account(folder).ignored) == sorted(old)
    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_proj.bias"])
def test_a_bias_that_is_missing_is_not_taken_for_an_old_mask(name, tmp_path):
    _, folder = make_gpt2(tmp_path)

    rename_tensors(folder, lambda found: None if found == name else found)

    with pytest.raises(CheckpointError, match=name.removeprefix("transformer.")):
        ours(folder)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.mask", "transformer.h.0.bias", "transformer.attn.bias"])
def test_a_name_like_a_masks_is_not_ignored(name, tmp_path):
    _, folder = make_gpt2(tmp_path)

    add_tensors(folder, **{name: torch.ones(2)})

    with pytest.raises(CheckpointError, match=name):
        ours(folder)


def test_a_head_in_the_file_counts_although_the_configuration_ties_it(tmp_path):
    _, folder = make_gpt2(tmp_path)
    add_tensors(folder, **{"lm_head.weight": torch.randn(96, 48, generator=torch.Generator().manual_seed(9))})

    found = all_logits(ours(folder), TEXTS)

    assert_same(found, their_logits(GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()))


def test_a_configuration_from_before_the_key_ties(tmp_path):
    model, _ = make_gpt2(tmp_path)
    folder = saved(model, tmp_path, tie_word_embeddings=None)

    assert_same(all_logits(ours(folder), TEXTS), their_logits(model))


def test_other_architectures_names_of_sizes_are_read_too(tmp_path):
    model, _ = make_gpt2(tmp_path)
    common = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    common["n_positions"] = "max_position_embeddings"

    folder = saved(model, tmp_path, **dict.fromkeys(common), **{common[name]: GPT2[name] for name in common})

    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("by_width", [False, True])
def test_scores_are_scaled_as_in_transformers(by_layer, by_width):
    raw = {**GPT2, "scale_attn_weights": by_width, "scale_attn_by_inverse_layer_idx": by_layer}
    oracle = GPT2Model(GPT2Config(**raw))

    config = OurConfig.parse({**raw, "model_type": "gpt2"})

    assert [config.scale(layer) for layer in range(2)] == [block.attn.scaling for block in oracle.h]


def test_scores_in_16_bit_are_as_fine_as_upcast_ones(tmp_path):
    exact = make_model(GPT2Model, GPT2, n_layer=1).bfloat16()
    with torch.no_grad():
        exact.h[0].attn.c_attn.bias[: 2 * GPT2["n_embd"]] += 8.0  # large scores, of which 16 bit keeps little
    folder = saved(exact, tmp_path)
    expected = their_hidden(exact.float())
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16}
    plain, upcast = (
        GPT2Model.from_pretrained(folder, reorder_and_upcast_attn=asked, **options).eval() for asked in (False, True)
    )

    found = our_hidden(ours(folder, dtype=torch.bfloat16))

    assert difference(found, expected) < 1.2 * difference(their_hidden(upcast), expected)
    assert difference(found, expected) < 0.5 * difference(their_hidden(plain), expected)


def test_cross_attention_is_refused_by_name(tmp_path):
    model, _ = make_gpt2(tmp_path)

    folder = saved(model, tmp_path, add_cross_attention=True)

    with pytest.raises(CheckpointError, match=r"add_cross_attention.*cross attention is not supported"):
        ours(folder)


def test_heads_that_do_not_share_the_width_are_refused(tmp_path):
    model, _ = make_gpt2(tmp_path)

    folder = saved(model, tmp_path, n_head=5)

    with pytest.raises(CheckpointError, match="n_embd 48 is not a multiple of n_head 5"):
        ours(folder)


def test_positions_end_where_their_table_ends(tmp_path):
    model, folder = make_gpt2(tmp_path)
    longest = [at % 90 for at in range(64)]

    with lorax.load(folder, pooling="last") as engine:
        vector = engine.embed(longest)
        with pytest.raises(CapacityError, match=r"65 tokens is too long.*64"):
            engine.embed([*longest, 1])
        with pytest.raises(CapacityError, match="64 tokens is too long: the model holds 64"):
            engine.generate(longest)
        with pytest.raises(CapacityError, match="60 tokens and 5 more"):
            engine.generate(longest[:60], max_tokens=5)

    assert_same([torch.from_numpy(vector)], [their_hidden(model, [longest])[0][-1]])


def test_a_classifier_of_texts_generates_as_well_for_its_head_is_tied(tmp_path):
    _, folder = make_gpt2(tmp_path, GPT2ForSequenceClassification, num_labels=3, pad_token_id=0)
    oracle = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()

    base = ours(folder)

    assert base.default_task is Task.SEQUENCE_CLASSIFICATION
    assert base.model.tasks == (Task.GENERATE, Task.EMBED, Task.SEQUENCE_CLASSIFICATION)
    assert_same(all_logits(base, TEXTS), their_logits(oracle))


def test_the_second_of_two_heads_is_left_out(tmp_path):
    model, folder = make_gpt2(tmp_path, GPT2DoubleHeadsModel)

    base = ours(folder)

    assert base.default_task is Task.GENERATE
    assert_same(our_hidden(base), their_hidden(model))


def test_the_names_of_lorax_fix_the_task(tmp_path):
    _, folder = make_gpt2(tmp_path)

    tasks = [ours(folder, model_class=kind).model.tasks for kind in (FlashGPT2ForCausalLM, FlashGPT2ForEmbeddings)]

    assert tasks == [(Task.GENERATE,), (Task.EMBED,)]


@pytest.mark.parametrize("modules", [["c_attn"], ["c_proj"], ["c_attn", "c_proj", "c_fc"]])
@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2Model])
def test_an_adapter_does_not_mind_that_matrices_stand_the_other_way_round(kind, modules, tmp_path):
    model, folder = make_gpt2(tmp_path / "base", kind)
    lora = make_lora(model, tmp_path / "lora", target_modules=modules, fan_in_fan_out=True)
    base = ours(folder)
    adapter = make_adapters(base, a=lora).get("a")

    found = all_logits(base, TEXTS, [adapter] * len(TEXTS))

    changed = with_lora(make_model(kind, GPT2), lora).base_model.model
    head = torch.nn.functional.linear
    assert_same(found, [head(rows, changed.get_input_embeddings().weight) for rows in their_hidden(changed)])
