"""Declares GPT-2 to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


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
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
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
        # No heads: core's defaults for causal models have transformers' names, `score` and `classifier`.
        features=("tied_embeddings",),
        cases="lorax_gpt2.cases:GPT2",
    )
