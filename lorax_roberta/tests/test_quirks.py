from __future__ import annotations

import pytest
import torch
from oracles import (
    TEXTS,
    add_tensors,
    assert_same,
    make_model,
    our_hidden,
    ours,
    rename_tensors,
    saved,
    their_hidden,
    their_logits,
)
from transformers import (
    CamembertForSequenceClassification,
    RobertaForMaskedLM,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
    XLMRobertaForSequenceClassification,
)

import lorax_core as lorax
from lorax_core.errors import CapacityError, CheckpointError
from lorax_core.types import Task
from lorax_roberta.config import RobertaConfig
from lorax_roberta.modeling import (
    FlashRobertaForSequenceClassification,
    FlashRobertaForTokenClassification,
    FlashXlmRoberta,
)

ROBERTA = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "type_vocab_size": 1,
}


def make_roberta(folder, kind=RobertaModel, seed=0, **changes):
    """A random RoBERTa of transformers, and its files."""
    model = make_model(kind, ROBERTA, seed, **changes)
    return model, saved(model, folder)


def old_norm(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_the_same_texts_give_the_same_rows_again(tmp_path):
    _, folder = make_roberta(tmp_path)
    base = ours(folder)

    first, second = our_hidden(base), our_hidden(base)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_padding_ids_inside_a_text_attend_but_do_not_count(tmp_path):
    model, folder = make_roberta(tmp_path)
    texts = [[5, 1, 9, 1, 1, 7], [1, 1], [8, 3]]

    assert_same(our_hidden(ours(folder), texts), their_hidden(model, texts))


def test_positions_end_before_their_table_does(tmp_path):
    model, folder = make_roberta(tmp_path)
    longest = [2 + at for at in range(62)]

    with lorax.load(folder) as engine:
        vector = engine.embed(longest)
        with pytest.raises(CapacityError, match=r"63 tokens is too long.*62"):
            engine.embed([*longest, 2])

    assert_same([torch.from_numpy(vector)], [their_hidden(model, [longest])[0][0]])


def test_padding_is_one_unless_the_configuration_says_otherwise():
    raw = {**ROBERTA, "model_type": "roberta"}

    found = [RobertaConfig.parse({**raw, **more}) for more in ({}, {"pad_token_id": None}, {"pad_token_id": 3})]

    assert [(config.padding, config.max_tokens) for config in found] == [(1, 62), (1, 62), (3, 60)]


@pytest.mark.parametrize("kind", [RobertaModel, RobertaForMaskedLM, RobertaForQuestionAnswering])
def test_a_file_may_have_the_prefix_or_not_and_heads_that_are_not_served(kind, tmp_path):
    model, folder = make_roberta(tmp_path, kind)
    rows = their_hidden(model)

    assert_same(our_hidden(ours(folder)), rows)
    rename_tensors(folder, lambda name: name.removeprefix("roberta."))
    assert_same(our_hidden(ours(folder)), rows)


def test_old_files_call_norms_gamma_and_beta_and_hold_position_numbers(tmp_path):
    model, folder = make_roberta(tmp_path)

    rename_tensors(folder, old_norm)
    add_tensors(folder, **{"embeddings.position_ids": torch.arange(64)[None]})

    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type.*'relative_key'"),
        ({"is_decoder": True}, "is_decoder.*attends to earlier tokens only"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
        ({"pad_token_id": 63}, "max_position_embeddings 64 leaves no position after pad_token_id 63"),
        ({"pad_token_id": -1}, "pad_token_id -1"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(raw, told):
    with pytest.raises(CheckpointError, match=told):
        RobertaConfig.parse({**ROBERTA, "model_type": "roberta", **raw})


@pytest.mark.parametrize(
    "kind",
    [RobertaForSequenceClassification, XLMRobertaForSequenceClassification, CamembertForSequenceClassification],
)
def test_three_model_types_are_one_architecture(kind, tmp_path):
    model, folder = make_roberta(tmp_path, kind, num_labels=4)
    expected = [row.softmax(-1) for row in their_logits(model)]

    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)

    by_name = [dict(zip(answer.labels, answer.scores, strict=True)) for answer in answers]
    assert_same([torch.tensor([named[f"LABEL_{at}"] for at in range(4)]) for named in by_name], expected)


@pytest.mark.parametrize(
    ("kind", "names", "task"),
    [
        (RobertaModel, FlashXlmRoberta, Task.EMBED),
        (RobertaForTokenClassification, FlashRobertaForTokenClassification, Task.TOKEN_CLASSIFICATION),
        (RobertaForSequenceClassification, FlashRobertaForSequenceClassification, Task.SEQUENCE_CLASSIFICATION),
        (RobertaForSequenceClassification, FlashXlmRoberta, Task.EMBED),
    ],
)
def test_the_names_of_lorax_fix_the_task(kind, names, task, tmp_path):
    _, folder = make_roberta(tmp_path, kind)

    assert ours(folder, model_class=names).model.tasks == (task,)


def test_a_checkpoint_without_the_head_says_which_it_has(tmp_path):
    _, folder = make_roberta(tmp_path, RobertaForTokenClassification)

    with pytest.raises(
        CheckpointError, match=r"no head of 'roberta' for 'sequence-classification'; those that it has: 'embed', 'token"
    ):
        ours(folder, model_class=FlashRobertaForSequenceClassification)
