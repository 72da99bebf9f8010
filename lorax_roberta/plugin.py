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
    return ArchitectureSpec(
        model_type=model_type,
        summary=summary,
        examples=examples,
        api=1,
        config="lorax_roberta.config:RobertaConfig",
        backbone="lorax_roberta.modeling:FlashRobertaModel",
        heads={
            Task.EMBED: "lorax_core.modeling.heads:EmbeddingHead",
            Task.TOKEN_CLASSIFICATION: "lorax_core.modeling.heads:TokenClassificationHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_roberta.modeling:RobertaSequenceClassificationHead",
        },
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
        tiny_config={
            "vocab_size": 128,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 256,
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "pad_token_id": 1,
        },
        tiny_variants={
            "padding_at_zero": {"pad_token_id": 0},
            "late_padding": {"pad_token_id": 5, "max_position_embeddings": 70},
            "two_token_types": {"type_vocab_size": 2},
            "tanh_gelu": {"hidden_act": "gelu_new"},
            "wide_epsilon": {"layer_norm_eps": 0.1},
            "odd_vocabulary": {"vocab_size": 131},
        },
        references={
            Task.EMBED: f"transformers:{name}Model",
            Task.TOKEN_CLASSIFICATION: f"transformers:{name}ForTokenClassification",
            Task.SEQUENCE_CLASSIFICATION: f"transformers:{name}ForSequenceClassification",
        },
    )
