"""Declares GPT-NeoX to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


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
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
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
        cases="lorax_neox.cases:GPT_NEOX",
    )
