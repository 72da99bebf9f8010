"""Declares GPT-NeoX to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl

_VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "sequential": {"use_parallel_residual": False},
    "no_attention_bias": {"attention_bias": False},
    "half_rotary": {"rotary_pct": 0.5},
    "whole_rotary": {"rotary_pct": 1.0},
    "odd_rotary": {"rotary_pct": 0.3},
    "no_rotary": {"rotary_pct": 0.0},
    "other_base": {"rotary_emb_base": 500},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "tanh_gelu": {"hidden_act": "gelu_new"},
    "fast_gelu": {"hidden_act": "gelu_fast"},
    "wide_epsilon": {"layer_norm_eps": 0.1},
    "padding": {"pad_token_id": 0},
    "odd_vocabulary": {"vocab_size": 131},
}


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """GPT-NeoX: a causal decoder with partly rotary positions."""
    yield ArchitectureSpec(
        model_type="gpt_neox",
        summary="GPT-NeoX decoders: Pythia, GPT-NeoX-20B, Dolly.",
        examples=("EleutherAI/pythia-160m", "EleutherAI/gpt-neox-20b", "databricks/dolly-v2-3b"),
        api=1,
        config="lorax_neox.config:GPTNeoXConfig",
        backbone="lorax_neox.modeling:FlashGPTNeoXModel",
        heads={
            Task.GENERATE: "lorax_core.modeling.heads:LanguageModelHead",
            Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
            Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_core.modeling.heads:LastTokenClassificationHead",
        },
        hf_architectures={
            "GPTNeoXForCausalLM": Task.GENERATE,
            "GPTNeoXModel": Task.EMBED,
            "GPTNeoXForQuestionAnswering": Task.EMBED,
            "GPTNeoXForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "GPTNeoXForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings",),
        tiny_config={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 256,
        },
        tiny_variants=_VARIANTS,
        references={
            Task.GENERATE: "transformers:GPTNeoXForCausalLM",
            Task.EMBED: "transformers:GPTNeoXModel",
            Task.TOKEN_CLASSIFICATION: "transformers:GPTNeoXForTokenClassification",
            Task.SEQUENCE_CLASSIFICATION: "transformers:GPTNeoXForSequenceClassification",
        },
    )
