"""What is particular to ModernBERT: its windows and rotary bases, its heads, and what a `config.json` may not ask for."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    ModernBertConfig as TheirConfig,
)
from transformers import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)
from transformers.masking_utils import sliding_window_bidirectional_mask_function

import lorax_core as lorax
from lorax_modernbert.cases import MODERNBERT
from lorax_modernbert.config import ModernBertConfig

TINY = {"model_type": "modernbert", **MODERNBERT.tiny_config}
TEXTS = [[5, 9, 2, 77, 13], [30], [3, 1, 1, 8, 60, 61, 62], [7 + at % 100 for at in range(300)]]
# What transformers 4 wrote, as the published checkpoints have it.
OLD = {
    "model_type": "modernbert",
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "layer_norm_eps": 1e-05,
    "position_embedding_type": "absolute",
    "reference_compile": None,
    "pad_token_id": 0,
}


def make(kind, folder, *, attention="eager", **changes):
    """A random model of transformers and its files."""
    torch.manual_seed(0)
    config = TheirConfig(**{**MODERNBERT.tiny_config, "num_labels": 3, **changes})
    model = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.1 + (1.0 if tensor.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def logits(model):
    """What the model's head says of each text."""
    return [model(torch.tensor([ids])).logits[0] for ids in TEXTS]


@torch.inference_mode()
def means(model):
    """The mean of the hidden rows of each text."""
    return torch.stack([model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in TEXTS])


def scores(answers):
    """The scores of each text in the order of the labels' numbers."""
    return torch.tensor([[score for _, score in sorted(zip(one.labels, one.scores, strict=True))] for one in answers])


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kind", [ModernBertModel, ModernBertForMaskedLM, ModernBertForQuestionAnswering, ModernBertForMultipleChoice]
)
def test_any_head_that_gives_no_labels_leaves_an_encoder(kind, attention, tmp_path):
    changes = {"num_labels": 2} if kind is ModernBertForQuestionAnswering else {}
    model = make(kind, tmp_path, attention=attention, **changes)

    with lorax.load(tmp_path, dtype="float32", pooling="mean") as engine:
        vectors = torch.from_numpy(engine.embed(TEXTS))
        tasks = engine.info().tasks

    assert tasks == ("embed",)
    assert_same(vectors, means(model))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_labels_of_texts_are_those_of_transformers(pooling, tmp_path):
    model = make(ModernBertForSequenceClassification, tmp_path, classifier_pooling=pooling)

    with lorax.load(tmp_path, dtype="float32") as engine:
        answers = engine.classify(TEXTS)

    assert_same(scores(answers), torch.stack(logits(model)).softmax(-1))


def test_labels_of_tokens_are_those_of_transformers(tmp_path):
    model = make(ModernBertForTokenClassification, tmp_path)

    with lorax.load(tmp_path, dtype="float32") as engine:
        answers = engine.classify(TEXTS)

    best = torch.cat(logits(model)).softmax(-1).max(-1)
    assert [label for answer in answers for label in answer.labels] == [f"LABEL_{at}" for at in best.indices]
    assert_same(torch.tensor([score for answer in answers for score in answer.scores]), best.values)


def test_a_classifier_trained_on_a_masked_language_model_takes_the_rest_of_its_head_from_there(tmp_path):
    make(ModernBertForMaskedLM, tmp_path / "base")
    classifier = ModernBertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, attn_implementation="eager"
    ).eval()
    settings = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["Wqkv", "Wi", "dense"])
    adapted = get_peft_model(classifier, settings)
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor += 0.2 * torch.randn_like(tensor)
    adapted.save_pretrained(tmp_path / "lora")

    with lorax.load(tmp_path / "base", dtype="float32") as engine:
        engine.adapters.load("lora", tmp_path / "lora")
        answers = engine.classify(TEXTS, adapter="lora")

    assert isinstance(adapted.eval(), PeftModel)
    assert_same(scores(answers), torch.stack(logits(adapted)).softmax(-1))


@pytest.mark.parametrize("size", [1, 2, 7, 8, 16])
def test_a_window_ends_where_transformers_ends_it(size):
    ours = ModernBertConfig.parse({**TINY, "local_attention": size})
    theirs = sliding_window_bidirectional_mask_function(TheirConfig(local_attention=size).sliding_window)

    rows = torch.arange(40)
    seen = torch.stack([torch.stack([theirs(0, 0, row, key) for key in rows]) for row in rows])

    assert ours.window(0) is None
    assert torch.equal((rows - rows[:, None]).abs() < ours.window(1), seen)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"global_attn_every_n_layers": 2},
        {"global_rope_theta": 40000.0, "local_rope_theta": 500.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"full_attention": {"rope_theta": 7.0, "rope_type": "default"}}},
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        {"rope_theta": 3.0, "partial_rotary_factor": 0.5},
        {"sliding_window": 5},
        {"head_dim": 16},
        {"layer_types": ["full_attention"] * 7, "rope_parameters": {"sliding_attention": {"rope_type": "longrope"}}},
    ],
)
def test_files_mean_what_they_mean_to_transformers(changes):
    raw = {**OLD, **changes}
    theirs = TheirConfig.from_dict(raw)
    rotary = ModernBertModel._from_config(theirs).rotary_emb

    ours = ModernBertConfig.parse(raw)

    assert list(ours.layer_types) == theirs.layer_types
    assert ours.local_attention // 2 == theirs.sliding_window
    assert ours.rope.keys() == set(theirs.layer_types)
    for kind, rope in ours.rope.items():
        assert torch.equal(rope.frequencies(16)[0], getattr(rotary, f"{kind}_inv_freq"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classifier_pooling": "max"}, "classifier_pooling.*'max'"),
        ({"local_attention": 0}, "local_attention.*found 0"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers of 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types.*'chunked_attention'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            "rope_parameters has 'rope_theta'.*layer type",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "full_attention.type.*'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.5}}, "turns whole heads"),
        ({"local_rope_theta": None}, "local_rope_theta is null"),
        ({"head_dim": 32}, "head_dim 32.*num_attention_heads 2"),
        ({"global_attn_every_n_layers": 0}, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, told):
    with pytest.raises(lorax.CheckpointError, match=told):
        ModernBertConfig.parse({**TINY, **changes})
