from __future__ import annotations

import pytest
import torch
from builders import make_lora, with_lora
from oracles import (
    TEXTS,
    add_tensors,
    assert_same,
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
from transformers import GPTNeoXForCausalLM, GPTNeoXModel

from lorax_core.errors import CheckpointError
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import assemble
from lorax_neox.config import GPTNeoXConfig
from lorax_neox.modeling import FlashGPTNeoXForCausalLM, FlashGPTNeoXForEmbeddings

NEOX = {
    "vocab_size": 96,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}


def make_neox(folder, kind=GPTNeoXForCausalLM, seed=0, **changes):
    """A random GPT-NeoX of transformers, and its files."""
    model = make_model(kind, NEOX, seed, **changes)
    return model, saved(model, folder)


def account(folder):
    return assemble(Checkpoint(folder), installed(), None, "cpu")[1]


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_the_head_has_two_names_in_files(name, tmp_path):
    model, folder = make_neox(tmp_path)

    rename_tensors(folder, lambda found: name if found == "embed_out.weight" else found)

    assert_same(all_logits(ours(folder), TEXTS), their_logits(model))


def test_a_file_may_have_the_prefix_or_not(tmp_path):
    model, folder = make_neox(tmp_path)

    rename_tensors(folder, lambda name: name.removeprefix("gpt_neox."))

    assert_same(our_hidden(ours(folder)), their_hidden(model))


def test_masks_and_frequencies_of_old_files_are_ignored(tmp_path):
    model, folder = make_neox(tmp_path)
    old = {}
    for layer in range(2):
        path = f"gpt_neox.layers.{layer}.attention"
        old[f"{path}.bias"] = torch.ones(1, 1, 64, 64).tril()
        old[f"{path}.masked_bias"] = torch.tensor(-1e9)
        old[f"{path}.rotary_emb.inv_freq"] = torch.ones(2)  # not those that the model turns by

    add_tensors(folder, **old)

    assert sorted(account(folder).ignored) == sorted(old)
    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize("name", ["attention.query_key_value.bias", "attention.dense.bias"])
def test_a_bias_that_is_missing_is_not_taken_for_an_old_mask(name, tmp_path):
    _, folder = make_neox(tmp_path)

    rename_tensors(folder, lambda found: None if found == f"gpt_neox.layers.1.{name}" else found)

    with pytest.raises(CheckpointError, match=f"missing from the checkpoint: 'layers.1.{name}'"):
        ours(folder)


def test_a_bias_that_the_configuration_denies_is_not_ignored(tmp_path):
    model, _ = make_neox(tmp_path)

    folder = saved(model, tmp_path, attention_bias=False)

    with pytest.raises(CheckpointError, match=r"no parameter takes: .*query_key_value\.bias"):
        ours(folder)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.3, 0.55, 1.0])
def test_any_fraction_of_a_head_turns(fraction, tmp_path):
    model, folder = make_neox(tmp_path, rotary_pct=fraction)

    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize(
    "old",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 700},
        {"rotary_pct": 0.5, "rotary_emb_base": 700, "rope_theta": 700},
        {"rotary_pct": 0.5, "rotary_emb_base": 700, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rotary_emb_base": 700, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rotary_pct": 0.0},
        {},
    ],
)
def test_rotary_parameters_are_read_in_their_old_names(old, tmp_path):
    _, folder = make_neox(tmp_path)
    folder = saved(make_model(GPTNeoXForCausalLM, NEOX), folder, rope_parameters=None, **old)

    oracle = GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()

    assert_same(our_hidden(ours(folder)), their_hidden(oracle))


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"rotary_pct": 1.5}, "rope.partial_rotary_factor.*1.5"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs factor"),
        ({"head_dim": 16}, "head_dim 16: a head of GPT-NeoX is"),
        ({"head_dim": 20.5}, "head_dim: .*20.5"),
        ({"num_attention_heads": 7}, "hidden_size 60 is not a multiple of num_attention_heads 7"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(raw, told):
    with pytest.raises(CheckpointError, match=told):
        GPTNeoXConfig.parse({**NEOX, "model_type": "gpt_neox", **raw})


def test_sequences_end_where_a_scaling_would_change_cached_keys():
    raw = {**NEOX, "model_type": "gpt_neox"}
    scaling = {"type": "dynamic", "factor": 4.0}

    lengths = [GPTNeoXConfig.parse(config).max_tokens for config in (raw, {**raw, "rope_scaling": scaling})]

    assert lengths == [64, 64]


def test_the_names_of_lorax_fix_the_task(tmp_path):
    _, folder = make_neox(tmp_path)

    kinds = (FlashGPTNeoXForCausalLM, FlashGPTNeoXForEmbeddings)
    tasks = [ours(folder, model_class=kind).model.tasks for kind in kinds]

    assert tasks == [(Task.GENERATE,), (Task.EMBED,)]


@pytest.mark.parametrize(
    "modules", [["query_key_value"], ["query_key_value", "dense", "dense_4h_to_h", "dense_h_to_4h"]]
)
@pytest.mark.parametrize("kind", [GPTNeoXForCausalLM, GPTNeoXModel])
def test_an_adapter_does_not_mind_that_q_k_v_stand_head_by_head(kind, modules, tmp_path):
    model, folder = make_neox(tmp_path / "base", kind)
    lora = make_lora(model, tmp_path / "lora", target_modules=modules)
    base = ours(folder)
    adapter = make_adapters(base, a=lora).get("a")

    found = our_hidden(base, adapter=adapter)

    assert_same(found, their_hidden(with_lora(make_model(kind, NEOX), lora).base_model.model))
