from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes import FlakyBackend, PagedEcho
from rigs import Inbox, finish, make_loaded, make_loop, make_sequence, within

from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.worker import EngineWorker
from lorax_core.errors import LoraxError, RequestError, StepError
from lorax_core.kvcache.allocator import PageAllocator

LIMIT = 60  # seconds: for a call that hangs, not for one that is slow


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


@pytest.fixture
def make_worker(base):
    workers = []

    def make(**options):
        loop = make_loop(base, **options)
        workers.append(EngineWorker(loop))
        return workers[-1], loop

    yield make
    for worker in workers:
        worker.close()


def written(base, prompt, count):
    return finish(make_loop(base), make_sequence(prompt, count))[0]


def answered(worker, *sequences):
    """Hands sequences in and waits for all of them."""
    worker.submit(sequences)
    for sequence in sequences:
        assert sequence.sink.finished.wait(LIMIT), "no answer"
    return [sequence.output for sequence in sequences]


class Deed(Inbox):
    """An inbox that does something when the first token comes; it runs in the engine's own thread."""

    def __init__(self, deed):
        super().__init__()
        self.deed = deed
        self.done = threading.Event()

    def __call__(self, update):
        super().__call__(update)
        if len(self.updates) == 1:
            self.deed()
            self.done.set()


def test_many_threads_may_call_one_engine(base, make_worker):
    worker, loop = make_worker(max_rows=5, pages=24)
    prompts = [[at % 11 + 20, at % 3 + 9] for at in range(48)]
    expected = {tuple(prompt): written(base, prompt, 6) for prompt in prompts}

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda prompt: answered(worker, make_sequence(prompt, 6))[0], prompts))

    assert found == [expected[tuple(prompt)] for prompt in prompts]
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


def test_requests_handed_in_together_share_their_first_step(make_worker):
    worker, loop = make_worker()
    sequences = [make_sequence([20 + at], 3) for at in range(5)]

    answered(worker, *sequences)

    assert loop.totals.steps == 3


def test_a_request_that_is_cancelled_hears_no_more_and_its_pages_are_free_before_the_next_step(base, make_worker):
    worker, loop = make_worker(pages=4)
    waiting = make_sequence([9] * 40, 20)
    greedy = make_sequence([8] * 40, 20)

    def leave():
        worker.abort([greedy])
        worker.submit([waiting])

    greedy.sink = Deed(leave)
    worker.submit([greedy])
    assert waiting.sink.finished.wait(LIMIT)

    assert len(greedy.sink.updates) == 1
    # One step for the token of the one that left; the other then found the cache empty.
    assert loop.totals.steps == 1 + 20
    assert waiting.output == written(base, [9] * 40, 20)


def test_a_request_may_be_cancelled_before_it_ever_ran(make_worker):
    worker, _ = make_worker()
    gone, first = make_sequence([7], 5), make_sequence([8], 2)

    def leave():
        worker.submit([gone])
        worker.abort([gone])

    first.sink = Deed(leave)
    answered(worker, first)
    answered(worker, make_sequence([9], 3))

    assert gone.sink.updates == []
    assert gone.finished


def test_closing_ends_living_requests_with_an_error(make_worker):
    worker, _ = make_worker()
    running, behind = make_sequence([7], 400), make_sequence([8], 400)
    running.sink = Deed(worker.close)  # a close from the engine's own thread must not wait for itself
    worker.submit([running, behind])

    within(LIMIT, worker.close)

    for sequence in (running, behind):
        assert isinstance(sequence.sink.error, LoraxError)
        assert "closed" in str(sequence.sink.error)
        assert len(sequence.output) < 400


def test_closing_ends_requests_that_have_not_begun(make_worker):
    worker, _ = make_worker()
    first, late = make_sequence([7], 400), make_sequence([8], 400)

    def close_behind():
        worker.submit([late])
        worker.close()

    first.sink = Deed(close_behind)
    worker.submit([first])
    assert first.sink.done.wait(LIMIT)

    within(LIMIT, worker.close)

    assert isinstance(late.sink.error, LoraxError)
    assert late.output == []


def test_a_closed_engine_refuses_work_and_may_be_closed_again(make_worker):
    worker, _ = make_worker()
    worker.close()
    worker.close()

    with pytest.raises(RequestError, match="closed"):
        worker.submit([make_sequence([7])])
    with pytest.raises(RequestError, match="closed"):
        worker.call(lambda loop: None)
    worker.abort([make_sequence([7])])  # nothing to leave


def test_many_threads_may_close_one_engine(make_worker):
    worker, loop = make_worker()
    sequence = make_sequence([7], 400)
    worker.submit([sequence])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(worker.close) for _ in range(8)]:
            done.result(LIMIT)

    assert sequence.sink.finished.is_set()
    assert "closed" in str(sequence.sink.error)
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


def test_a_step_that_breaks_answers_with_an_error_and_the_engine_serves_on(base, make_worker):
    backend = FlakyBackend(lambda ids: 13 in ids)
    worker, _ = make_worker(backend=backend)

    broken = make_sequence([20, 13], 4)
    answered(worker, broken)
    backend.blows = lambda ids: False

    assert isinstance(broken.sink.error, StepError)
    assert answered(worker, make_sequence([20, 13], 4)) == [written(base, [20, 13], 4)]


def test_a_caller_that_cannot_take_its_answer_does_not_stop_the_others(base, make_worker):
    worker, _ = make_worker()

    def fail():
        raise RuntimeError("the caller's event loop is closed")

    rude = make_sequence([7], 5)
    rude.sink = Deed(fail)
    worker.submit([rude])

    assert answered(worker, make_sequence([20], 5)) == [written(base, [20], 5)]
    assert rude.finished
    assert len(rude.sink.updates) == 1


class LosesCount(Scheduler):
    """A scheduler with a bug: its second plan fails."""

    plans = 0

    def plan(self):
        self.plans += 1
        assert self.plans < 2, "the books are wrong"
        return super().plan()


def test_when_the_loop_itself_breaks_callers_hear_of_it_and_nobody_waits_for_ever():
    scheduler = LosesCount(max_tokens=16, max_rows=1, allocator=PageAllocator(9, 4))
    worker = EngineWorker(EngineLoop(scheduler, PagedEcho(page_size=4)))
    running, waiting = make_sequence([1], 50), make_sequence([2], 50)

    answered(worker, running, waiting)

    assert isinstance(running.sink.error, LoraxError)
    assert isinstance(waiting.sink.error, LoraxError)
    with pytest.raises(RequestError, match="closed"):
        worker.submit([make_sequence([3])])
    within(LIMIT, worker.close)


def test_a_job_runs_between_two_steps_in_the_engines_thread(make_worker):
    worker, loop = make_worker()
    seen = []

    worker.call(lambda given: seen.append((given, threading.current_thread().name)))

    assert seen == [(loop, "lorax-engine")]


def test_the_error_of_a_job_is_its_callers(base, make_worker):
    worker, _ = make_worker()

    def fail(loop):
        raise KeyError("not here")

    with pytest.raises(KeyError, match="not here"):
        worker.call(fail)

    assert answered(worker, make_sequence([20], 2)) == [written(base, [20], 2)]


class Panic(BaseException):
    """What a Rust library raises when it breaks: no Exception."""


def test_a_panic_ends_every_request_and_closes_the_engine(make_worker):
    def blow(ids):
        raise Panic("the tokenizer broke")

    worker, _ = make_worker(backend=FlakyBackend(blow))
    sequence = make_sequence([1, 2, 3], 4)

    worker.submit([sequence])

    assert sequence.sink.finished.wait(LIMIT)
    assert isinstance(sequence.sink.error, LoraxError)
    within(LIMIT, worker.close)
    with pytest.raises(RequestError, match="closed"):
        worker.submit([make_sequence([1], 1)])


def test_others_may_abort_while_an_adapter_that_failed_is_reported(make_worker):
    worker, loop = make_worker()
    aborted = []

    class Sink(Inbox):
        def __call__(self, update):
            within(LIMIT, lambda: worker.abort([]))
            aborted.append(update.error)
            super().__call__(update)

    class Never:
        identity = "never"

    class Closed:
        def start_plan(self): ...
        def acquire(self, handle):
            return False

        def release(self, handle): ...

    loop.scheduler.gate = Closed()
    sequence = make_sequence([1, 2, 3], 4, adapter=Never())
    sequence.sink = Sink()
    worker.submit([sequence])
    worker.adapter_came(sequence.adapter, LoraxError("it is bad"))

    assert sequence.sink.finished.wait(LIMIT)
    assert str(aborted[0]) == "it is bad"
