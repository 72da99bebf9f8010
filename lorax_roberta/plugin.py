"""Declares RoBERTa, XLM-RoBERTa and CamemBERT to lorax-core. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """One architecture under three names: bidirectional encoders, for embeddings and classification."""
    yield _spec(
        "roberta",
        "Roberta",
        "RoBERTa encoders, for embeddings and classification.",
        ("FacebookAI/roberta-base", "sentence-transformers/all-distilroberta-v1"),
    )
    yield _spec(
        "xlm-roberta",
        "XLMRoberta",
        "XLM-RoBERTa encoders of a hundred languages, among them multilingual embedding models.",
        ("BAAI/bge-m3", "intfloat/multilingual-e5-base", "FacebookAI/xlm-roberta-base"),
    )
    yield _spec(
        "camembert",
        "Camembert",
        "CamemBERT, the RoBERTa of French.",
        ("almanach/camembert-base", "dangvantuan/sentence-camembert-base"),
    )


def _spec(model_type: str, name: str, summary: str, examples: tuple[str, ...]) -> ArchitectureSpec:
    """The architecture as `model_type`, whose classes in transformers begin with `name`."""
    # One model_type each, since `config.json` names them apart although the arithmetic is the same.
    return ArchitectureSpec(
        model_type=model_type,
        summary=summary,
        examples=examples,
        api=1,
        config="lorax_roberta.config:RobertaConfig",
        backbone="lorax_roberta.modeling:FlashRobertaModel",
        tasks=(Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={Task.SEQUENCE_CLASSIFICATION: "lorax_roberta.modeling:RobertaSequenceClassificationHead"},
        hf_architectures={
            f"{name}Model": Task.EMBED,
            f"{name}ForMaskedLM": Task.EMBED,
            f"{name}ForQuestionAnswering": Task.EMBED,
            f"{name}ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            f"{name}ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.EMBED,
        causal=False,
        features=("token_types",),
        cases=f"lorax_roberta.cases:{name.upper()}",
    )
