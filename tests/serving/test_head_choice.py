"""Whose head answers, over a base that has several."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lorax_core.serving.head_choice import HeadChooser
from lorax_core.types import Task


class Heads:
    """A base with a head for each of its tasks."""

    tasks = (Task.GENERATE, Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)

    def head(self, task):
        assert task in self.tasks
        return f"the base's for {task.value}"


def adapter(task, head=None):
    return SimpleNamespace(task=task, head=head)


@pytest.mark.parametrize("trained", Heads.tasks)
@pytest.mark.parametrize("task", [Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION])
def test_an_adapter_without_a_head_has_the_base_s_for_its_own_task(trained, task):
    chooser = HeadChooser(Heads(), None, trained)

    assert chooser.classifying(adapter(task)) == f"the base's for {task.value}"
    assert chooser.classifying(adapter(task, head="its own")) == "its own"


def test_an_adapter_of_another_kind_has_the_head_that_the_checkpoint_was_trained_for():
    chooser = HeadChooser(Heads(), None, Task.TOKEN_CLASSIFICATION)

    assert chooser.classifying(adapter(Task.GENERATE)) == "the base's for token-classification"
    assert chooser.classifying(None) == "the base's for token-classification"
