"""Declares GPT-2 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl

_VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False, "n_layer": 1},
    "scaled_by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "narrow": {"n_inner": 96},
    "relu": {"activation_function": "relu"},
    "exact_gelu": {"activation_function": "gelu"},
    "wide_epsilon": {"layer_norm_epsilon": 0.1},
    "padding": {"pad_token_id": 0},
    "odd_vocabulary": {"vocab_size": 131},
}


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """GPT-2: a causal decoder with learned positions."""
    yield ArchitectureSpec(
        model_type="gpt2",
        summary="GPT-2 decoders and what was trained from them.",
        examples=("openai-community/gpt2", "distilbert/distilgpt2", "microsoft/DialoGPT-medium"),
        api=1,
        config="lorax_gpt2.config:GPT2Config",
        backbone="lorax_gpt2.modeling:FlashGPT2Model",
        heads={
            Task.GENERATE: "lorax_core.modeling.heads:LanguageModelHead",
            Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
            Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_core.modeling.heads:LastTokenClassificationHead",
        },
        hf_architectures={
            "GPT2LMHeadModel": Task.GENERATE,
            "GPT2DoubleHeadsModel": Task.GENERATE,
            "GPT2Model": Task.EMBED,
            "GPT2ForQuestionAnswering": Task.EMBED,
            "GPT2ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "GPT2ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings",),
        tiny_config={
            "vocab_size": 128,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 256,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        tiny_variants=_VARIANTS,
        references={
            Task.GENERATE: "transformers:GPT2LMHeadModel",
            Task.EMBED: "transformers:GPT2Model",
            Task.TOKEN_CLASSIFICATION: "transformers:GPT2ForTokenClassification",
            Task.SEQUENCE_CLASSIFICATION: "transformers:GPT2ForSequenceClassification",
        },
    )
