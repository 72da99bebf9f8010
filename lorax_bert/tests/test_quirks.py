from __future__ import annotations

import pytest
import torch
from builders import make_lora, with_lora
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
from rigs import bound_to, make_adapters
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import lorax_core as lorax
from lorax_bert.config import BertConfig
from lorax_bert.modeling import FlashBert, FlashBertForSequenceClassification, FlashBertForTokenClassification
from lorax_core.adapters.apply import AdapterRowsMaker
from lorax_core.errors import CheckpointError
from lorax_core.modeling.batch import HeadRows
from lorax_core.types import Task

BERT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def make_bert(folder, kind=BertModel, seed=0, **changes):
    """A random BERT of transformers, and its files."""
    model = make_model(kind, BERT, seed, **changes)
    return model, saved(model, folder)


def by_label(answer, labels):
    """The scores of a text in the order of the model's labels."""
    named = dict(zip(answer.labels, answer.scores, strict=True))
    return torch.tensor([named[label] for label in labels])


def old_norm(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def head_logits(head, hidden, bound=None):
    """What a head says of some texts, each alone, with the rows that it reads."""
    chosen = [rows[list(head.span(range(len(rows)), 0))] for rows in hidden]
    return [
        head(
            rows,
            HeadRows(
                head.task, (0,), (len(rows),), torch.arange(len(rows)), AdapterRowsMaker().rows([len(rows)], [bound])
            ),
        )
        for rows in chosen
    ]


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_old_files_call_every_norm_gamma_and_beta(prefix, tmp_path):
    model, folder = make_bert(tmp_path)

    rename_tensors(folder, lambda name: prefix + old_norm(name))

    assert_same(our_hidden(ours(folder)), their_hidden(model))


def test_position_numbers_of_old_files_are_ignored(tmp_path):
    model, folder = make_bert(tmp_path)

    add_tensors(folder, **{"embeddings.position_ids": torch.arange(64)[None]})

    assert_same(our_hidden(ours(folder)), their_hidden(model))


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining, BertForQuestionAnswering])
def test_any_head_that_is_not_served_leaves_an_encoder(kind, tmp_path):
    model, folder = make_bert(tmp_path, kind)

    base = ours(folder)

    assert base.model.tasks == (Task.EMBED,)
    assert_same(our_hidden(base), their_hidden(model))


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type.*'relative_key'"),
        ({"position_embedding_type": "relative_key_query"}, "position_embedding_type.*'relative_key_query'"),
        ({"is_decoder": True}, "is_decoder.*attends to earlier tokens only"),
        ({"num_attention_heads": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(raw, told):
    with pytest.raises(CheckpointError, match=told):
        BertConfig.parse({**BERT, "model_type": "bert", **raw})


@pytest.mark.parametrize(
    ("problem", "labels", "finish"),
    [
        (None, 3, lambda logits: logits.softmax(-1)),
        ("single_label_classification", 3, lambda logits: logits.softmax(-1)),
        ("multi_label_classification", 3, torch.sigmoid),
        ("regression", 2, lambda logits: logits),
        (None, 1, lambda logits: logits),
    ],
)
def test_scores_of_a_text_are_what_its_problem_type_says(problem, labels, finish, tmp_path):
    names = {at: f"kind {at}" for at in range(labels)}
    model, folder = make_bert(tmp_path, BertForSequenceClassification, problem_type=problem, id2label=names)

    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)

    assert_same([by_label(answer, names.values()) for answer in answers], [finish(row) for row in their_logits(model)])


def test_a_token_classifier_with_a_pooler_is_told_from_a_classifier_of_texts(tmp_path):
    model, folder = make_bert(tmp_path, BertForTokenClassification, num_labels=4)
    pooler = {"bert.pooler.dense.weight": torch.ones(48, 48), "bert.pooler.dense.bias": torch.ones(48)}

    add_tensors(folder, **pooler)
    with lorax.load(folder) as engine:
        answers = engine.classify(TEXTS)

    best = [row.softmax(-1).max(-1) for row in their_logits(model)]
    assert [answer.labels for answer in answers] == [[f"LABEL_{at}" for at in row.indices] for row in best]
    assert_same([torch.tensor(answer.scores) for answer in answers], [row.values for row in best])


@pytest.mark.parametrize("adapted", [False, True])
def test_heads_that_nothing_tells_apart_share_their_tensors_and_adapters(adapted, tmp_path):
    texts, folder = make_bert(tmp_path / "base", BertForSequenceClassification, num_labels=4)
    tokens = BertForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()
    lora = make_lora(texts, tmp_path / "lora", target_modules=["classifier"])
    base = ours(saved(texts, folder, architectures=None))
    adapter = make_adapters(base, a=lora).get("a") if adapted else None
    if adapted:
        texts, tokens = with_lora(texts, lora), with_lora(tokens, lora)

    hidden = our_hidden(base, adapter=adapter)

    assert base.model.tasks == (Task.EMBED, Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION)
    for task, oracle in ((Task.TOKEN_CLASSIFICATION, tokens), (Task.SEQUENCE_CLASSIFICATION, texts)):
        found = head_logits(base.model.head(task), hidden, bound_to(base)[adapter.identity] if adapted else None)
        assert_same(found, [rows.reshape(-1, 4) for rows in their_logits(oracle)])


def test_a_classifier_of_texts_needs_its_pooler(tmp_path):
    _, folder = make_bert(tmp_path, BertForSequenceClassification)

    rename_tensors(folder, lambda name: None if "pooler" in name else name)

    with pytest.raises(CheckpointError, match=r"lacks 'pooler\.dense\.weight', 'pooler\.dense\.bias', the head for"):
        ours(folder, model_class=FlashBertForSequenceClassification)


@pytest.mark.parametrize(
    ("kind", "names", "task"),
    [
        (BertModel, FlashBert, Task.EMBED),
        (BertForTokenClassification, FlashBert, Task.EMBED),
        (BertForTokenClassification, FlashBertForTokenClassification, Task.TOKEN_CLASSIFICATION),
        (BertForSequenceClassification, FlashBertForSequenceClassification, Task.SEQUENCE_CLASSIFICATION),
    ],
)
def test_the_names_of_lorax_fix_the_task(kind, names, task, tmp_path):
    _, folder = make_bert(tmp_path, kind)

    assert ours(folder, model_class=names).model.tasks == (task,)
