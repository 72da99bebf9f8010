"""What a plugin refuses is told in its words, and a checkpoint without the head of its class is told what it lacks."""

from __future__ import annotations

import json

import pytest
from builders import change_json, change_tensors, make_bert, make_qwen2
from validators import SENTENCE

import lorax_core as lorax
from lorax_bert.modeling import FlashBertForSequenceClassification
from lorax_core.errors import CheckpointError, RequestError
from lorax_core.plugins import ArchitectureSpec
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus
from lorax_core.weights.check import check_checkpoint
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.loader import load_model
from lorax_qwen2.modeling import FlashQwen2ForCausalLM, FlashQwen2ForEmbeddings

# --- words ---


@pytest.fixture
def refusal(tmp_path, host):
    """What loading a sound checkpoint says under a plugin with another config or backbone."""

    def refuse(**changes):
        spec = ArchitectureSpec.model_validate({**dict(host.architecture("qwen2")), **changes})
        changed = PluginHost([PluginRecord("mine", "mine", "", "", PluginStatus.READY, architectures=(spec,))])
        with pytest.raises(CheckpointError) as caught:
            load_model(Checkpoint(make_qwen2(tmp_path / "model")), changed)
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    "changes",
    [
        {"config": "validators:OfAField"},
        {"config": "validators:OfTheWhole"},
        {"config": "validators:ByAssertion"},
        {"config": "validators:InNormalise"},
        {"config": "validators:InAPartOfNormalise"},
        {"backbone": "validators:InABackbone"},
        {"backbone": "validators:InAMap"},
    ],
    ids=lambda changes: next(iter(changes.values())),
)
def test_a_refusal_is_the_sentence_of_its_author(refusal, changes):
    said = refusal(**changes)

    assert SENTENCE in said
    for frame in (
        "validation error",
        "Value error",
        "Assertion failed",
        "ValidationError",
        "type=",
        "pydantic",
        "http",
    ):
        assert frame not in said


# --- heads ---


@pytest.fixture
def headless(tmp_path):
    """A Qwen2ForCausalLM without its head, which is not tied."""
    folder = make_qwen2(tmp_path / "headless", tie_word_embeddings=False)
    change_tensors(folder / "model.safetensors", lambda tensors: without(tensors, "lm_head.weight"))
    return folder


def without(tensors, *names):
    assert set(names) <= set(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in names}


LACKS = "says that it is a Qwen2ForCausalLM, but lacks 'lm_head.weight', the head for 'generate'"


def test_a_checkpoint_without_its_head_is_not_ok_and_told_what_it_lacks(headless, host):
    report = check_checkpoint(headless, host)

    assert (report.ok, report.verdict) == (False, "incomplete")
    assert report.problems == [f"{headless} {LACKS}"]
    assert report.tasks == ["embed"]


def test_the_command_names_it_and_exits_with_1(headless, capsys):
    from lorax_core.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(["models", "check", str(headless), "--json"])

    said = json.loads(capsys.readouterr().out)
    assert caught.value.code == 1
    assert said["verdict"] == "incomplete"
    assert "'lm_head.weight'" in said["problems"][0]


def test_it_cannot_be_loaded_to_generate(headless, host):
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head\.weight'") as caught:
        load_model(Checkpoint(headless), host, model_class=FlashQwen2ForCausalLM)

    assert "tie_word_embeddings" in caught.value.hint


def test_it_embeds_all_the_same_and_refuses_to_generate(headless, host):
    model = load_model(Checkpoint(headless), host, model_class=FlashQwen2ForEmbeddings).model
    with lorax.load(headless, host=host) as engine:
        (vector,) = engine.embed([[1, 2, 3]])
        with pytest.raises(CheckpointError, match=r"lacks 'lm_head\.weight'"):
            engine.generate([[1, 2, 3]], max_tokens=2)
        again = engine.embed([[1, 2, 3]])[0]

    assert model.tasks == ("embed",)
    assert vector.shape == (model.config.hidden_size,)
    assert (vector == again).all()


def test_a_classifier_without_its_layer_is_told_so(tmp_path, host):
    folder = make_bert(tmp_path / "bert")
    change_json(folder / "config.json", architectures=["BertForSequenceClassification"])

    report = check_checkpoint(folder, host)
    with pytest.raises(CheckpointError, match=r"BertForSequenceClassification, but lacks 'classifier\.weight'"):
        load_model(Checkpoint(folder), host, model_class=FlashBertForSequenceClassification)

    assert report.verdict == "incomplete"
    assert "'classifier.weight', 'classifier.bias'" in report.problems[0]


@pytest.mark.parametrize(
    "changes",
    [{"tie_word_embeddings": True}, {"architectures": ["Qwen2Model"]}, {"architectures": None}, {"is_causal": False}],
    ids=str,
)
def test_nothing_is_lacking_where_no_head_is_claimed_or_needed(headless, host, changes):
    change_json(headless / "config.json", **changes)

    report = check_checkpoint(headless, host)

    assert (report.verdict, report.problems) == ("ok", [])


def test_a_task_that_nobody_claimed_is_refused_as_before(headless, host):
    change_json(headless / "config.json", architectures=["Qwen2Model"])
    with lorax.load(headless, host=host) as engine, pytest.raises(RequestError, match="no head for 'generate'"):
        engine.generate([[1, 2, 3]], max_tokens=2)
