"""Faults of the machine, not of a request: who is hit hears of it, the others get what they would have got alone."""

from __future__ import annotations

import pytest
import torch
from builders import make_lora, make_qwen2_model
from rigs import finish, make_adapters, make_loaded, make_loop, make_sequence

from lorax_core.adapters.bound import UnbindAdapter
from lorax_core.attention.torch import TorchBackend
from lorax_core.errors import AdapterError, StepError


class SmallMemory(TorchBackend):
    """A device that holds so many rows of a step and no more."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def plan(self, rows):
        if len(rows.input_ids) > self.rows:
            raise torch.OutOfMemoryError(f"{len(rows.input_ids)} rows do not fit")
        return super().plan(rows)


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


def alone(base, prompt, count, **options):
    return finish(make_loop(base), make_sequence(prompt, count, **options))[0]


def test_a_step_that_does_not_fit_in_memory_is_done_in_pieces(base):
    prompts = [[20, 21, 22], [30, 31], [40, 41, 42, 43]]
    loop = make_loop(base, backend=SmallMemory(rows=4))

    answers = finish(loop, *(make_sequence(prompt, 5) for prompt in prompts))

    assert answers == [alone(base, prompt, 5) for prompt in prompts]


def test_a_request_that_does_not_fit_alone_ends_and_the_others_go_on(base):
    loop = make_loop(base, backend=SmallMemory(rows=4))
    huge, small = make_sequence(range(20, 40), 5), make_sequence([30, 31], 5)

    finish(loop, huge, small)

    assert isinstance(huge.sink.error, StepError)
    assert "20 rows do not fit" in huge.sink.error.message
    assert small.output == alone(base, [30, 31], 5)
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


def test_an_adapter_that_vanished_ends_its_requests_and_never_answers_as_the_base(base, tmp_path):
    folder = make_lora(make_qwen2_model(), tmp_path, target_modules="all-linear")
    store = make_adapters(base, one=folder)
    adapter = store.get("one")
    loop = make_loop(base, adapters=store)
    adapted, plain = make_sequence([20, 21, 22], 6, adapter=adapter), make_sequence([20, 21, 22], 6)
    loop.add(adapted)
    loop.add(plain)
    loop.step()

    store.bound.handle(UnbindAdapter(adapter.identity))
    finish(loop)

    assert isinstance(adapted.sink.error, AdapterError)
    assert "is not bound" in adapted.sink.error.message
    assert len(adapted.output) == 1
    assert plain.output == alone(base, [20, 21, 22], 6)
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity
