"""What is particular to Llama and Mistral: how they differ, and what a `config.json` may not ask for."""

from __future__ import annotations

import pytest
import torch
import transformers

import lorax_core as lorax
from lorax_llama.cases import LLAMA, MISTRAL
from lorax_llama.config import LlamaConfig, MistralConfig


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope.type.*'longrope'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        LlamaConfig.parse({**LLAMA.tiny_config, "model_type": "llama", **changes})


def test_llama_has_no_window_and_mistral_has_one():
    fields = {"sliding_window": 8, "attention_bias": True, "mlp_bias": True}

    llama = LlamaConfig.parse({**LLAMA.tiny_config, "model_type": "llama", **fields})
    mistral = MistralConfig.parse({**MISTRAL.tiny_config, "model_type": "mistral", **fields})

    # What transformers' class does not have, it does not read.
    assert (llama.window, llama.attention_bias, llama.mlp_bias) == (None, True, True)
    assert (mistral.window, mistral.attention_bias, mistral.mlp_bias) == (8, False, False)


def test_defaults_of_mistral_are_those_of_transformers():
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16}
    theirs = transformers.MistralConfig(**sizes)

    ours = MistralConfig.parse({"model_type": "mistral", **sizes})

    names = ("intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
    assert ours.window == theirs.sliding_window
    # Null is as many as heads, and not the default.
    assert (
        MistralConfig.parse({"model_type": "mistral", **sizes, "num_key_value_heads": None}).num_key_value_heads == 16
    )


def test_a_head_for_questions_is_left_out(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA.tiny_config)
    model = transformers.LlamaForQuestionAnswering._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)

    with lorax.load(tmp_path, dtype="float32") as engine:
        vector = torch.from_numpy(engine.embed([5, 9, 2, 77, 13]))

    with torch.inference_mode():
        expected = model.base_model(torch.tensor([[5, 9, 2, 77, 13]])).last_hidden_state[0, -1]
    torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)
