"""Declares Llama and Mistral to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """One architecture under two names: decoders for text, embeddings and classification."""
    yield _spec(
        "llama",
        "Llama",
        "Llama decoders, and the many that have their form.",
        (
            "meta-llama/Llama-3.2-1B-Instruct",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
    )
    yield _spec(
        "mistral",
        "Mistral",
        "Mistral decoders, and the embedding models made of them.",
        ("mistralai/Mistral-7B-Instruct-v0.3", "intfloat/e5-mistral-7b-instruct"),
        "sliding_window",
    )


def _spec(
    model_type: str, name: str, summary: str, examples: tuple[str, ...], *features: Literal["sliding_window"]
) -> ArchitectureSpec:
    """The architecture as `model_type`, whose classes in transformers begin with `name`."""
    return ArchitectureSpec(
        model_type=model_type,
        summary=summary,
        examples=examples,
        api=1,
        config=f"lorax_llama.config:{name}Config",
        backbone="lorax_llama.modeling:LlamaBackbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.TOKEN_CLASSIFICATION: "lorax_llama.modeling:LlamaTokenClassificationHead",
        },
        hf_architectures={
            f"{name}ForCausalLM": Task.GENERATE,
            f"{name}Model": Task.EMBED,
            f"{name}ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            f"{name}ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
            f"{name}ForQuestionAnswering": Task.EMBED,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings", *features),
        cases=f"lorax_llama.cases:{name.upper()}",
    )
