"""What is particular to DistilBERT: its answers through the public API are those of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)

import lorax_core as lorax

TINY = {
    "vocab_size": 90,
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 80,
    "max_position_embeddings": 32,
    "num_labels": 3,
}
TEXTS = [[5, 9, 2, 77, 13], [30], [3, 1, 1, 8, 60, 61, 62], list(range(2, 34))]


def make(kind, folder, **changes):
    """A random model of transformers, in which only the table of positions is as it was made, and its files."""
    torch.manual_seed(0)
    model = kind._from_config(DistilBertConfig(**{**TINY, **changes}), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "position_embeddings" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + (0.5 if tensor.ndim == 1 else 0.0))
    model.save_pretrained(folder)
    return model


def change_config(folder, **changes):
    """Other values in a `config.json`; None takes a key out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rename(folder, name_of):
    """Other names for the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    save_file({name_of(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@torch.inference_mode()
def means(model):
    """The mean of the hidden rows of each text."""
    return torch.stack([model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in TEXTS])


@torch.inference_mode()
def logits(model):
    """What the model's head says of each text."""
    return [model(torch.tensor([ids])).logits[0] for ids in TEXTS]


def embed(folder):
    with lorax.load(folder, dtype="float32", pooling="mean") as engine:
        return torch.from_numpy(engine.embed(TEXTS))


def classify(folder):
    with lorax.load(folder, dtype="float32") as engine:
        return engine.classify(TEXTS)


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("sinusoidal", [False, True])
@pytest.mark.parametrize("kind", [DistilBertModel, DistilBertForMaskedLM, DistilBertForQuestionAnswering])
def test_vectors_are_those_of_transformers(kind, sinusoidal, tmp_path):
    model = make(kind, tmp_path, sinusoidal_pos_embds=sinusoidal, num_labels=2)

    vectors = embed(tmp_path)

    assert_same(vectors, means(model))


def test_labels_of_texts_are_those_of_transformers(tmp_path):
    model = make(DistilBertForSequenceClassification, tmp_path)

    answers = classify(tmp_path)

    scores = [dict(zip(answer.labels, answer.scores, strict=True)) for answer in answers]
    found = torch.tensor([[of_text[f"LABEL_{at}"] for at in range(3)] for of_text in scores])
    assert_same(found, torch.stack(logits(model)).softmax(-1))


def test_labels_of_tokens_are_those_of_transformers(tmp_path):
    model = make(DistilBertForTokenClassification, tmp_path)

    answers = classify(tmp_path)

    best = torch.cat(logits(model)).softmax(-1).max(-1)
    assert [label for answer in answers for label in answer.labels] == [f"LABEL_{at}" for at in best.indices]
    assert_same(torch.tensor([score for answer in answers for score in answer.scores]), best.values)


@pytest.mark.parametrize("kind", [DistilBertForSequenceClassification, DistilBertForTokenClassification])
def test_a_classifier_without_the_prefix_says_the_same(kind, tmp_path):
    make(kind, tmp_path)
    before = classify(tmp_path)

    rename(tmp_path, lambda name: name.removeprefix("distilbert."))

    assert classify(tmp_path) == before


def test_position_numbers_of_old_files_are_ignored(tmp_path):
    model = make(DistilBertModel, tmp_path)
    file = tmp_path / "model.safetensors"

    save_file({**load_file(file), "embeddings.position_ids": torch.arange(32)[None]}, file, metadata={"format": "pt"})

    assert_same(embed(tmp_path), means(model))


def test_the_common_names_of_sizes_are_taken_too(tmp_path):
    model = make(DistilBertModel, tmp_path)

    change_config(
        tmp_path, dim=None, hidden_size=48, n_layers=None, num_hidden_layers=2, n_heads=None, num_attention_heads=4
    )

    assert_same(embed(tmp_path), means(model))


def test_what_stands_in_the_code_of_transformers_is_read_of_no_file(tmp_path):
    model = make(DistilBertModel, tmp_path)

    change_config(tmp_path, layer_norm_eps=0.5, type_vocab_size=2, hidden_act="relu", intermediate_size=7)

    assert_same(embed(tmp_path), means(model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": None}, "dim: Field required"),
        ({"n_layers": 0}, "n_layers: .*found 0"),
        ({"n_heads": 5}, "dim 48 is not a multiple of n_heads 5"),
        ({"activation": "gelo"}, "'gelo' is not supported"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_the_names_in_the_file(changes, told, tmp_path):
    make(DistilBertModel, tmp_path)

    change_config(tmp_path, **changes)

    with pytest.raises(lorax.CheckpointError, match=told):
        lorax.load(tmp_path)
