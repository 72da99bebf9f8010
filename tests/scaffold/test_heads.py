"""Heads of encoders are seen by their numbers, and what changes their answers is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lorax_core.scaffold.fields import Field
from lorax_core.scaffold.heads import PooledHead, find_heads, refuse_in_heads
from lorax_core.scaffold.source import Source, read_source
from lorax_core.scaffold.tiny import Tiny
from lorax_core.types import Task

RELU = {"hidden_act": "relu"}
POOLED = {
    "BertModel": (RELU, PooledHead("pooler.dense", "classifier", "tanh")),
    "ElectraModel": (RELU, PooledHead("classifier.dense", "classifier.out_proj", "gelu")),
    "DistilBertModel": ({"activation": "silu"}, PooledHead("pre_classifier", "classifier", "relu")),
}


class BentConfig(BertConfig):
    model_type = "bent"
    slope: float = 1.0


class BentForSequenceClassification(BertForSequenceClassification):
    """BERT, but for logits that are multiplied by a number of the configuration."""

    config_class = BentConfig

    def __init__(self, config):
        super().__init__(config)
        inner = self.classifier.forward
        self.classifier.forward = lambda pooled: inner(pooled) * config.slope


class FollowingForSequenceClassification(BertForSequenceClassification):
    """BERT, but for a pooler with the activation of feed-forward blocks."""

    def __init__(self, config):
        super().__init__(config)
        self.bert.pooler.activation = torch.nn.ReLU() if config.hidden_act == "relu" else torch.nn.Tanh()


def tiny_of(kind, config=BertConfig):
    return Tiny(Source(config.model_type, config, {Task.EMBED: BertModel, Task.SEQUENCE_CLASSIFICATION: kind}, (), {}))


@pytest.mark.parametrize(("name", "expected"), POOLED.items(), ids=POOLED)
def test_the_head_of_texts_is_two_layers_with_an_activation(name, expected):
    acts, pooled = expected
    source = read_source(f"transformers:{name}")
    classes = {task: kind for task, kind in source.classes.items() if task is not Task.GENERATE}
    tiny = Tiny(Source(source.model_type, source.config_class, classes, (), {}))

    found = find_heads(tiny, (), acts)

    assert found.pooled == pooled
    assert found.layers == {Task.TOKEN_CLASSIFICATION: "classifier", Task.SEQUENCE_CLASSIFICATION: pooled.output}


def test_a_head_whose_activation_is_that_of_other_blocks_is_left_out():
    found = find_heads(tiny_of(FollowingForSequenceClassification), ("pooler.dense",), RELU)

    assert (found.pooled, found.layers) == (None, {})
    assert found.ignored == ("pooler.**", "classifier.**")


def test_a_class_that_takes_the_name_of_a_layer_for_another_head_is_no_encoder_alone():
    source = read_source("transformers:DistilBertModel")

    found = find_heads(Tiny(source), (), {"activation": "silu"})

    assert [kind.__name__ for kind in found.mistaken] == ["DistilBertForMultipleChoice"]
    assert "pre_classifier.**" not in found.ignored


def test_a_field_that_changes_the_answers_of_a_head_alone_is_refused():
    tiny = tiny_of(BentForSequenceClassification, BentConfig)
    fields = {
        "slope": Field("slope", "float", 1.0, harmless=[0.7], inert=True),
        "use_cache": Field("use_cache", "bool", True, harmless=[False], inert=True),
    }

    refuse_in_heads(tiny, fields, [Task.SEQUENCE_CLASSIFICATION])

    assert [name for name, one in fields.items() if one.refused] == ["slope"]
    assert fields["slope"].why == "0.7: BentForSequenceClassification gives other answers"
