"""Models without an engine: every class that a plugin names after LoRAX's loads, has its task, and computes as transformers."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from oracles import TEXTS, TOLERANCE

import lorax_core as lorax
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.resolve import load_cases, load_class
from lorax_core.settings import Settings
from lorax_core.testing import reference
from lorax_core.testing.inputs import Input
from lorax_core.types import Task

HOST = PluginHost.discover(Settings())
SHORT = [ids[:20] for ids in TEXTS]


def model_classes():
    """(spec, class) of each subclass of Model that the modelling file of an installed architecture defines."""
    modules = {}
    for spec in HOST.architectures.values():
        modules.setdefault(spec.backbone.partition(":")[0], spec)  # RoBERTa's module is one for three names
    for name, spec in modules.items():
        for _, found in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if issubclass(found, lorax.Model) and found.__module__ == name:
                yield spec, found


CLASSES = list(model_classes())


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a tiny checkpoint of an architecture for a task; gives the folder and the model of transformers."""

    def make(spec, task):
        cases = load_cases(spec, HOST.owner(spec.model_type))
        folder = reference.build(cases, task, cases.tiny_config, tmp_path / spec.model_type, seed=1)
        return folder, reference.reload(cases, task, folder)

    return make


def expected_answer(oracle, model, task, types):
    """What transformers gives for SHORT, in the shape of the model's answer."""
    found = [reference.expect(oracle, Input(tuple(ids), (0,) * len(ids)), types=types) for ids in SHORT]
    if task is Task.EMBED:
        spans = [model.head(task).span(ids, 0) for ids in SHORT]
        return torch.stack([one.hidden[span.start : span.stop].sum(0) for one, span in zip(found, spans, strict=True)])
    logits = [one.logits for one in found]
    return torch.stack(logits) if task is Task.SEQUENCE_CLASSIFICATION else torch.cat(logits)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_every_plugin_of_this_repository_has_such_classes():
    names = {found.__name__ for _, found in CLASSES}

    assert {"FlashBert", "FlashBertModelForClassification", "FlashXlmRoberta", "FlashGPT2ForCausalLM"} <= names
    assert {"FlashGPTNeoXForCausalLM", "FlashQwen2ForCausalLM", "FlashQwen2ForEmbeddings"} <= names


@pytest.mark.parametrize(("spec", "kind"), CLASSES, ids=[kind.__name__ for _, kind in CLASSES])
def test_a_class_has_its_task_and_the_numbers_of_transformers(spec, kind, checkpoint):
    folder, oracle = checkpoint(spec, kind.task)

    model = lorax.load_model(folder, model_class=kind, host=HOST)
    batch = lorax.make_batch(model, SHORT)
    answers = model(batch).answers

    assert type(model) is kind
    assert model.tasks == (kind.task,)
    assert [group.task for group in batch.head_rows] == [kind.task]
    assert_close(answers[0], expected_answer(oracle, model, kind.task, "token_types" in spec.features))


@pytest.mark.parametrize("model_type", ["bert", "qwen2"])
def test_a_plain_model_answers_every_task_of_its_checkpoint(model_type, checkpoint):
    spec = HOST.architecture(model_type)
    folder, oracle = checkpoint(spec, spec.default_task)

    model = lorax.load_model(folder, host=HOST)
    batch = lorax.make_batch(model, SHORT)
    answers = model(batch).answers

    assert len(model.tasks) == len(answers)
    for group, answer in zip(batch.head_rows, answers, strict=True):
        assert_close(answer, expected_answer(oracle, model, group.task, "token_types" in spec.features))


def test_a_batch_may_be_run_again(checkpoint):
    folder, _ = checkpoint(HOST.architecture("gpt2"), Task.GENERATE)
    model = lorax.load_model(folder, host=HOST)
    batch = lorax.make_batch(model, SHORT)

    first, second = model(batch).answers[0], model(batch).answers[0]

    assert torch.equal(first, second)


def test_the_dtype_is_the_one_asked_for(checkpoint):
    folder, _ = checkpoint(HOST.architecture("gpt2"), Task.GENERATE)

    model = lorax.load_model(folder, dtype="bfloat16", device="cpu", host=HOST)

    assert model.dtype is torch.bfloat16
    assert model(lorax.make_batch(model, [[1, 2, 3]])).answers[0].shape == (3, 128)


def test_a_class_of_another_architecture_is_refused(checkpoint):
    folder, _ = checkpoint(HOST.architecture("gpt2"), Task.GENERATE)
    kind = load_class("lorax_bert.modeling:FlashBert", None)

    with pytest.raises(
        lorax.CheckpointError, match="FlashBert is a class for 'bert'; the checkpoint is 'gpt2'"
    ) as caught:
        lorax.load_model(folder, model_class=kind, host=HOST)

    assert caught.value.hint == "use a class of lorax_gpt2.modeling"


@pytest.mark.parametrize(
    ("sequences", "error", "complaint"),
    [
        ([], lorax.RequestError, "at least one sequence"),
        ([[1], []], lorax.RequestError, "at least one token id"),
        ([[1, 128]], lorax.RequestError, "token id 128 is outside the vocabulary of 128"),
        ([[1, -1]], lorax.RequestError, "token id -1"),
        ([[1] * 321], lorax.CapacityError, "a sequence has 321 tokens; the model takes at most 320"),
    ],
)
def test_sequences_that_cannot_be_computed_are_refused(sequences, error, complaint, checkpoint):
    folder, _ = checkpoint(HOST.architecture("gpt2"), Task.GENERATE)
    model = lorax.load_model(folder, host=HOST)

    with pytest.raises(error, match=complaint):
        lorax.make_batch(model, sequences)
