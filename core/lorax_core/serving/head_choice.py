"""Which head answers.

Decides whose head it is, the adapter's or the base's, and which adapters to ask where a request's own has none that fits. Knows
nothing of texts or sequences.
"""

from __future__ import annotations

from collections.abc import Collection

from lorax_core.adapters.residency.handle import AdapterHandle, labels_of
from lorax_core.adapters.residency.store import AdapterStore
from lorax_core.errors import RequestError, listed, shown
from lorax_core.modeling.heads import CLASSIFICATION, Head
from lorax_core.modeling.model import Model
from lorax_core.serving.requests import AdapterChoice
from lorax_core.types import Task


class HeadChooser:
    """The heads of one engine. `default_task` is what the checkpoint was trained for."""

    def __init__(self, model: Model, adapters: AdapterStore, default_task: Task) -> None:
        self._model, self._adapters, self._default_task = model, adapters, default_task

    def check_generating(self, adapter: AdapterHandle | None, name: AdapterChoice) -> None:
        """Raises RequestError where no text can come: the base has no head for it, or the adapter was trained under labels.

        With such an adapter the base's head would give noise, without a word.
        """
        self._base(Task.GENERATE)
        if adapter is not None and adapter.task in CLASSIFICATION:
            raise RequestError(
                f"adapter {shown(name)} was trained for {adapter.task.value!r}; text that is made with it means nothing",
                hint="ask it with engine.classify, or engine.rerank where it has one label",
                http_hint="ask it at /tei/predict or /classify, or at /v1/rerank where it has one label",
            )

    def classifying(self, adapter: AdapterHandle | None) -> Head:
        """The adapter's head; else the base's for the task that the adapter, or the checkpoint, was trained for."""
        if adapter is not None and adapter.head is not None:
            return adapter.head
        # An adapter without a head of its own was trained under the base's.
        if adapter is not None and adapter.task in CLASSIFICATION:
            return self._base(adapter.task)
        if self._default_task in CLASSIFICATION:
            return self._base(self._default_task)
        # Without any, the error names one of them.
        there = next((task for task in CLASSIFICATION if task in self._model.tasks), None)
        return self._base(there or CLASSIFICATION[1], instead=CLASSIFICATION)

    def scoring(self, adapter: AdapterHandle | None) -> Head:
        """The adapter's head, else the base's, when it gives a text one number; raises RequestError when there is none."""
        task = Task.SEQUENCE_CLASSIFICATION
        head = adapter.head if adapter is not None else None
        whose = "the adapter's" if head is not None else "the checkpoint's"
        if head is None and (task in self._model.tasks or task in self._model.lacking):
            head = self._model.head(task)
        if head is not None and head.task is task and len(labels_of(head)) == 1:
            return head
        if head is None:
            found = f"this checkpoint has heads for {listed(one.value for one in self._model.tasks)}"
        else:
            found = f"{whose} is for {head.task.value!r} and has {len(labels_of(head))}: {listed(labels_of(head))}"
        names = self._with_head((task,), labels=1)
        raise RequestError(
            f"reranking needs a head for {task.value!r} with one label; {found}",
            hint=_ask(names)
            or "load a reranker, or an adapter with such a head; engine.classify gives the scores of several labels",
            http_hint=_ask(names)
            or "serve a reranker, or an adapter with such a head; POST /tei/predict gives the scores of several labels",
        )

    def _base(self, task: Task, *, instead: Collection[Task] = ()) -> Head:
        """The base's head; where it has none, the error names adapters that bring one for that task, or `instead`."""
        try:
            return self._model.head(task)
        except RequestError as error:
            names = self._with_head(instead or (task,))
            missing = "serve a checkpoint or an adapter with such a head; GET /tei/info says what this one does"
            raise RequestError(
                error.message, hint=_ask(names) or error.hint, http_hint=_ask(names) or missing
            ) from error

    def _with_head(self, tasks: Collection[Task], labels: int | None = None) -> list[str]:
        """The names of loaded adapters that bring a head for one of the tasks, with so many labels."""
        return [
            one.name
            for one in self._adapters.list()
            if one.labels and one.task in {task.value for task in tasks} and labels in (None, len(one.labels))
        ]


def _ask(names: Collection[str]) -> str | None:
    if not names:
        return None
    return f"name an adapter that has one: {listed(names)}"
