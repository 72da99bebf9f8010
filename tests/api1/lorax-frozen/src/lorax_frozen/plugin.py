"""Three architectures and an attention backend."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins import ArchitectureSpec, BackendSpec, Task, hookimpl


@hookimpl
def lorax_architectures() -> Iterable[ArchitectureSpec]:
    """A decoder of blocks, a decoder of layers, and an encoder."""
    yield ArchitectureSpec(
        model_type="gemma2",
        summary="Gemma 2, of core's blocks.",
        examples=("google/gemma-2-2b",),
        api=1,
        config="lorax_frozen.config:Gemma2Config",
        backbone="lorax_frozen.decoder:Gemma2Backbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.GENERATE: "lorax_frozen.decoder:CappedHead",
            Task.EMBED: "lorax_frozen.decoder:VectorHead",
            Task.TOKEN_CLASSIFICATION: "lorax_frozen.decoder:ScoreTokenHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_frozen.decoder:ScoreHead",
        },
        hf_architectures={
            "Gemma2ForCausalLM": Task.GENERATE,
            "Gemma2Model": Task.EMBED,
            "Gemma2ForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "Gemma2ForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings", "sliding_window"),
        cases="lorax_frozen.cases:GEMMA2",
    )
    yield ArchitectureSpec(
        model_type="opt",
        summary="OPT, of layers.",
        api=1,
        config="lorax_frozen.config:OptConfig",
        backbone="lorax_frozen.layers:OptBackbone",
        tasks=(Task.GENERATE, Task.EMBED, Task.SEQUENCE_CLASSIFICATION),
        heads={
            Task.GENERATE: "lorax_frozen.layers:PlainHead",
            Task.SEQUENCE_CLASSIFICATION: "lorax_frozen.layers:PlainScoreHead",
        },
        hf_architectures={
            "OPTForCausalLM": Task.GENERATE,
            "OPTModel": Task.EMBED,
            "OPTForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
            "OPTForQuestionAnswering": Task.EMBED,
        },
        default_task=Task.GENERATE,
        causal=True,
        features=("tied_embeddings",),
        cases="lorax_frozen.cases:OPT",
    )
    yield ArchitectureSpec(
        model_type="bert",
        summary="BERT, of core's encoder.",
        api=1,
        config="lorax_frozen.config:BertConfig",
        backbone="lorax_frozen.encoder:BertBackbone",
        tasks=(Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION),
        heads={Task.SEQUENCE_CLASSIFICATION: "lorax_frozen.encoder:PoolerHead"},
        hf_architectures={
            "BertModel": Task.EMBED,
            "BertForTokenClassification": Task.TOKEN_CLASSIFICATION,
            "BertForSequenceClassification": Task.SEQUENCE_CLASSIFICATION,
        },
        default_task=Task.EMBED,
        causal=False,
        features=("token_types",),
        cases="lorax_frozen.cases:BERT",
    )


@hookimpl
def lorax_attention_backends() -> Iterable[BackendSpec]:
    """One for a device that no machine has: what a backend computes is no part of the API."""
    yield BackendSpec(
        name="frozen",
        summary="Declared, and never used.",
        backend="lorax_frozen.plugin:NoBackend",
        device_types=("none",),
        priority=-1,
    )


class NoBackend:
    """Stands for a backend."""
