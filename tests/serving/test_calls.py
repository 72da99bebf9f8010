"""Calls: submitted without blocking, waited for in threads and event loops, cancelled, and started late."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from builders import make_lora, make_qwen2, make_qwen2_model
from caches import fresh_cache
from fakes import make_backend_spec, with_backends
from fsspec.implementations.memory import MemoryFileSystem
from rigs import make_sequence, within

import lorax_core as lorax
from lorax_core.engine.sequence import SequenceUpdate, discard
from lorax_core.serving.call import Call
from lorax_core.serving.prepare import Prepared

LIMIT = 60  # seconds: for a call that hangs, not for one that is slow


@pytest.fixture(scope="module")
def engine(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=2048, adapter_sources=["folder", "gated://bucket"]) as engine:
        yield engine


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """An engine with room for texts that take minutes."""
    folder = make_qwen2(tmp_path_factory.mktemp("endless"), max_position_embeddings=60_000)
    with lorax.load(folder, kv_cache_tokens=60_000, max_batch_rows=8) as engine:
        yield engine


class Gated(MemoryFileSystem):
    """A store of adapters whose listing waits until it is let through, or fails."""

    protocol = "gated"
    store: dict = {}  # noqa: RUF012  (fsspec keeps it on the class)
    pseudo_dirs: list = [""]  # noqa: RUF012
    asked = threading.Event()
    gate = threading.Event()
    listings = 0
    fault: Exception | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gated://", "memory://", 1))

    def ls(self, path, detail=True, **kwargs):
        Gated.listings += 1
        Gated.asked.set()
        assert Gated.gate.wait(LIMIT)
        if Gated.fault is not None:
            raise Gated.fault
        return super().ls(path, detail=detail, **kwargs)


@pytest.fixture
def gated(tmp_path, monkeypatch):
    """The name of an adapter that must be fetched through the gate."""
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))
    fsspec.register_implementation("gated", Gated, clobber=True)
    Gated.store.clear()
    Gated.asked.clear()
    Gated.gate.clear()
    Gated.listings, Gated.fault = 0, None
    folder = make_lora(make_qwen2_model(), tmp_path / "adapter")
    for file in folder.iterdir():
        if file.suffix in (".json", ".safetensors"):
            Gated().pipe_file(f"gated://bucket/it/{file.name}", file.read_bytes())
    yield "gated://bucket/it"
    Gated.gate.set()


def alive(engine):
    """How many sequences are in the engine."""
    found = []
    engine._worker.call(lambda loop: found.extend(loop.scheduler))
    return len(found)


def pages_in_use(engine):
    used = []
    engine._worker.call(
        lambda loop: used.append(loop.scheduler.allocator.capacity - loop.scheduler.allocator.available)
    )
    return used[0]


MIXED = [
    lorax.GenerateRequest(prompt=[5, 6], max_tokens=4, ignore_eos=True),
    lorax.EmbedRequest(input=[7, 8, 9]),
    lorax.GenerateRequest(prompt=[9], max_tokens=3, ignore_eos=True),
]


def same(one, other):
    assert [type(result) for result in one] == [type(result) for result in other]
    assert one[0].token_ids == other[0].token_ids
    np.testing.assert_allclose(one[1].vector, other[1].vector, atol=1e-5)
    assert one[2].token_ids == other[2].token_ids


def test_a_call_can_be_waited_for_and_awaited(engine):
    expected = engine.run(MIXED)

    async def awaited():
        return await engine.submit(MIXED)

    same(engine.submit(MIXED).wait(), expected)
    same(asyncio.run(asyncio.wait_for(awaited(), LIMIT)), expected)


def test_a_call_gives_its_results_to_everybody_who_waits(engine):
    call = engine.submit(MIXED)

    async def both():
        return await asyncio.gather(call._result(), call._result())

    with ThreadPoolExecutor(3) as pool:
        threads = [pool.submit(call.wait) for _ in range(2)]
        loops = [pool.submit(asyncio.run, both())]
        found = [one.result(LIMIT) for one in threads] + loops[0].result(LIMIT)

    assert len(found) == 4
    for one in found:
        same(one, found[0])
    assert call.done
    same(call.wait(), found[0])


def test_waiting_may_end_before_the_call(endless):
    call = endless.submit([lorax.GenerateRequest(prompt=[5], ignore_eos=True)])

    with pytest.raises(TimeoutError, match="still running"):
        call.wait(timeout=0)
    assert not call.done
    assert alive(endless) == 1
    call.cancel()

    assert alive(endless) == 0


def test_what_is_wrong_is_raised_by_submit_and_nothing_starts(engine):
    good = lorax.GenerateRequest(prompt=[5], max_tokens=2)

    for bad, error in (
        (lorax.GenerateRequest(prompt=[5] * 5000), lorax.CapacityError),
        (lorax.GenerateRequest(prompt=[10**6]), lorax.RequestError),
        (lorax.GenerateRequest(prompt=[5], adapter="nobody"), lorax.AdapterError),
        ("a prompt", lorax.RequestError),
    ):
        with pytest.raises(error):
            engine.submit([good, bad])

    assert alive(engine) == 0


def test_a_cancelled_call_leaves_and_says_so_to_those_who_wait(endless):
    call = endless.submit([lorax.GenerateRequest(prompt=[5], ignore_eos=True, n=2, temperature=1.0)])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call.wait)
        call.cancel()
        call.cancel()
        with pytest.raises(lorax.LoraxError, match="was cancelled"):
            waiting.result(LIMIT)

    assert call.done
    assert alive(endless) == 0
    assert pages_in_use(endless) == 0


def test_cancelling_a_call_that_is_done_changes_nothing(engine):
    call = engine.submit(MIXED)
    results = call.wait()

    call.cancel()

    assert call.wait() == results


@pytest.mark.parametrize("way", ["call", "stream", "stream without a context"])
def test_eight_tasks_that_are_cancelled_take_their_sequences_out(endless, way):
    request = lorax.GenerateRequest(prompt=[5], ignore_eos=True)

    async def one():
        if way == "call":
            await endless.submit([request])
        elif way == "stream":
            with endless.stream([5], ignore_eos=True) as stream:
                async for _ in stream:
                    pass
        else:
            async for _ in endless.stream([5], ignore_eos=True):
                pass

    async def all_of_them():
        tasks = [asyncio.create_task(one()) for _ in range(8)]
        while await asyncio.to_thread(alive, endless) < 8:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(all_of_them(), LIMIT))

    assert [type(one) for one in found] == [asyncio.CancelledError] * 8
    assert alive(endless) == 0
    assert pages_in_use(endless) == 0


def test_a_timeout_around_an_awaited_call_takes_it_out(endless):
    async def impatient():
        async with asyncio.timeout(0.01):
            await endless.submit([lorax.GenerateRequest(prompt=[5], ignore_eos=True)])

    with pytest.raises(TimeoutError):
        asyncio.run(impatient())

    assert alive(endless) == 0


def test_an_event_loop_that_was_closed_while_it_waited_hurts_nobody(endless):
    call = endless.submit([lorax.GenerateRequest(prompt=[5], ignore_eos=True)])
    loop = asyncio.new_event_loop()
    task = loop.create_task(call._update_async(each=True))
    loop.run_until_complete(asyncio.sleep(0))
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()

    call.cancel()

    assert call.done
    assert alive(endless) == 0


def test_a_task_that_is_cancelled_between_two_events_takes_its_stream_out(endless):
    """Also where something still holds the stream: here the frame that the task's exception keeps."""

    async def listen(heard):
        stream = endless.stream([5], ignore_eos=True)
        async for _ in stream:
            heard.set()
            await asyncio.Event().wait()  # as one who sends the event on would

    async def cancelled():
        heard = asyncio.Event()
        task = asyncio.create_task(listen(heard))
        await heard.wait()
        task.cancel()
        [error] = await asyncio.gather(task, return_exceptions=True)
        return error, await asyncio.to_thread(alive, endless)

    error, left = asyncio.run(asyncio.wait_for(cancelled(), LIMIT))

    assert isinstance(error, asyncio.CancelledError)
    assert left == 0


def test_a_stream_that_another_task_has_taken_over_goes_on(endless):
    async def first(stream, heard):
        await anext(stream)
        heard.set()
        await asyncio.Event().wait()

    async def handed_over():
        # Many tokens: those that come before somebody asks are one event.
        stream, heard = endless.stream([5], max_tokens=400, ignore_eos=True), asyncio.Event()
        task = asyncio.create_task(first(stream, heard))
        await heard.wait()
        events = [await anext(stream)]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return events + [event async for event in stream]

    events = asyncio.run(asyncio.wait_for(handed_over(), LIMIT))

    assert events[-1].completion is not None
    assert len(events[-1].completion.token_ids) == 400


def test_two_event_loops_in_two_threads_may_await_one_call(endless):
    call = endless.submit([lorax.GenerateRequest(prompt=[5], max_tokens=400, ignore_eos=True)])

    async def result():
        return await asyncio.wait_for(call, LIMIT)

    with ThreadPoolExecutor(2) as pool:
        one, other = [waiting.result(LIMIT) for waiting in [pool.submit(asyncio.run, result()) for _ in range(2)]]

    assert one == other == call.wait()
    assert len(one[0].token_ids) == 400


# --- adapters that must be fetched first ---


def test_a_call_whose_adapter_must_be_fetched_is_made_at_once_and_starts_when_it_is_there(engine, gated):
    request = lorax.GenerateRequest(prompt=[5, 6], max_tokens=4, adapter=gated)
    call = within(LIMIT, lambda: engine.submit([request, MIXED[0]]))
    stream = within(LIMIT, lambda: engine.stream([5, 6], max_tokens=4, adapter=gated))
    assert Gated.asked.wait(LIMIT)
    assert not call.done
    assert alive(engine) == 0  # of one call, all requests start together
    assert len(engine.generate([9], max_tokens=2, ignore_eos=True).token_ids) == 2

    Gated.gate.set()
    adapted, plain = within(LIMIT, call.wait)
    events = within(LIMIT, lambda: list(stream))

    assert plain.token_ids == engine.run([MIXED[0]])[0].token_ids
    assert events[-1].completion.token_ids == adapted.token_ids
    assert gated in engine.adapters
    engine.adapters.unload(gated)


def test_many_requests_for_one_source_fetch_it_once(engine, gated):
    request = lorax.GenerateRequest(prompt=[5, 6], max_tokens=2, adapter=gated)
    calls = [engine.submit([request]) for _ in range(12)]
    assert Gated.asked.wait(LIMIT)

    Gated.gate.set()
    found = [within(LIMIT, call.wait)[0].token_ids for call in calls]

    assert len({tuple(tokens) for tokens in found}) == 1
    assert Gated.listings <= 2  # before and after the download
    engine.adapters.unload(gated)


def test_a_fault_while_fetching_ends_the_call_and_nothing_else(engine, gated):
    Gated.fault = OSError("the wire is cut")
    call = engine.submit([lorax.GenerateRequest(prompt=[5, 6], adapter=gated), MIXED[0]])

    Gated.gate.set()
    with pytest.raises(lorax.AdapterError, match="the wire is cut"):
        within(LIMIT, call.wait)

    assert alive(engine) == 0
    assert gated not in engine.adapters
    assert engine.run([MIXED[0]])


def test_what_needs_no_fetch_is_refused_at_once(engine, gated):
    with pytest.raises(lorax.CapacityError):
        engine.submit([lorax.GenerateRequest(prompt=[5], adapter=gated), lorax.GenerateRequest(prompt=[5] * 5000)])

    assert not Gated.asked.is_set()


def test_requests_beside_one_whose_adapter_is_fetched_are_prepared_once_and_draw_one_seed(qwen2, gated):
    Gated.gate.set()
    drawn = {"prompt": [5, 6], "max_tokens": 12, "temperature": 3.0, "ignore_eos": True}
    with lorax.load(qwen2, kv_cache_tokens=512, adapter_sources=["gated://bucket/"]) as engine:
        fetching = [lorax.GenerateRequest(**drawn), lorax.EmbedRequest(input=[5], adapter=gated)]
        found = [engine.submit(fetching).wait(LIMIT)[0], engine.generate(**drawn)]
    with lorax.load(qwen2, kv_cache_tokens=512) as engine:
        expected = [engine.generate(**drawn), engine.generate(**drawn)]

    assert Gated.listings > 0
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_a_request_that_turns_out_wrong_after_the_fetch_ends_its_call(engine, gated):
    call = engine.submit([lorax.GenerateRequest(prompt=[5] * 5000, adapter=gated)])

    Gated.gate.set()

    with pytest.raises(lorax.CapacityError):
        within(LIMIT, call.wait)
    engine.adapters.unload(gated)


def test_a_call_that_is_cancelled_while_its_adapter_is_fetched_never_starts(engine, gated):
    call = engine.submit([lorax.GenerateRequest(prompt=[5], adapter=gated, max_tokens=2)])
    assert Gated.asked.wait(LIMIT)
    call.cancel()

    Gated.gate.set()
    with pytest.raises(lorax.LoraxError, match="cancelled"):
        within(LIMIT, call.wait)
    within(LIMIT, lambda: engine.adapters.fetch([gated]).result())

    assert alive(engine) == 0
    assert call._answers == []
    engine.adapters.unload(gated)


def test_closing_the_engine_ends_calls_whose_adapters_are_still_fetched(qwen2, gated):
    engine = lorax.load(qwen2, kv_cache_tokens=256, adapter_sources=["url"])
    call = engine.submit([lorax.GenerateRequest(prompt=[5], adapter=gated)])
    assert Gated.asked.wait(LIMIT)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(engine.close)
        Gated.gate.set()
        closing.result(LIMIT)

    with pytest.raises(lorax.LoraxError, match="closed"):
        within(LIMIT, call.wait)


@pytest.mark.parametrize("way", ["a task", "an interruption", "a dropped stream"])
def test_who_stops_waiting_for_a_fetch_leaves_nothing_behind_that_starts(engine, gated, way):
    request = lorax.GenerateRequest(prompt=[5], adapter=gated, max_tokens=2)
    if way == "a task":
        call = engine.submit([request])

        async def awaiting():
            task = asyncio.create_task(_result_of(call))
            while not call._wakers:
                await asyncio.sleep(0)
            task.cancel()
            return await asyncio.gather(task, return_exceptions=True)

        [error] = asyncio.run(asyncio.wait_for(awaiting(), LIMIT))
        assert isinstance(error, asyncio.CancelledError)
    elif way == "an interruption":
        call = engine.submit([request])
        helper = threading.Thread(target=_interrupt_who_waits, args=(call,))
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            call.wait()
        helper.join(LIMIT)
    else:
        stream = engine.stream([5], adapter=gated, max_tokens=2)
        call = stream._call
        del stream
        gc.collect()

    Gated.gate.set()
    within(LIMIT, lambda: engine.adapters.fetch([gated]).result())

    assert call.done
    assert call._answers == []
    assert alive(engine) == 0
    engine.adapters.unload(gated)


async def _result_of(call):
    return await call


def _interrupt_who_waits(call):
    while not call._changed._waiters:
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_a_closed_engine_fetches_nothing_any_more(qwen2, gated):
    engine = lorax.load(qwen2, kv_cache_tokens=256, adapter_sources=["url"])
    engine.close()
    Gated.gate.set()

    with pytest.raises(lorax.RequestError, match="closed"):
        engine.submit([lorax.GenerateRequest(prompt=[5], adapter=gated)])

    assert not Gated.asked.is_set()


def test_an_engine_says_what_its_last_step_did(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=256) as engine:
        assert (engine.info().totals.steps, engine.info().last_step) == (0, None)

        engine.generate([5, 6, 7], max_tokens=3, ignore_eos=True)

        info = engine.info()
        assert info.totals.steps == 3
        assert (info.last_step.decode_tokens, info.last_step.rows, info.last_step.pages) == (1, 1, 16)


def test_an_engine_says_what_all_of_its_steps_did(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=256) as engine:
        engine.run(
            [
                lorax.GenerateRequest(prompt=[5, 6, 7], max_tokens=3, n=2, ignore_eos=True),
                lorax.EmbedRequest(input=[5, 8]),
            ]
        )
        cancelled = engine.submit([lorax.GenerateRequest(prompt=[9], max_tokens=200, ignore_eos=True)])
        cancelled.cancel()

        totals = engine.info().totals

        assert (totals.prompt_tokens, totals.draft_tokens) >= (5, 0)
        assert (totals.finished, totals.failed) == (3, 0)
        assert totals.decode_tokens >= 4
        assert totals.steps >= 3
        assert totals.seconds > 0


def test_answers_that_failed_are_counted_as_such(qwen2, host):
    plugins = with_backends(host, make_backend_spec("stumbling", "StumblingBackend"))
    with lorax.load(qwen2, kv_cache_tokens=256, attention="stumbling", host=plugins) as engine:
        with pytest.raises(lorax.StepError):
            engine.run([lorax.EmbedRequest(input=[5]), lorax.EmbedRequest(input=[13])])

        assert (engine.info().totals.finished, engine.info().totals.failed) == (1, 1)


def test_a_process_ends_well_while_a_step_is_running(qwen2):
    script = (
        "import sys, lorax_core as lorax\n"
        "engine = lorax.load(sys.argv[1], kv_cache_tokens=256)\n"
        "request = lorax.GenerateRequest(prompt=[1] * 20, max_tokens=200, ignore_eos=True)\n"
        "call = engine.submit([request])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, qwen2], capture_output=True, text=True, timeout=300, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_a_call_that_ended_lets_go_of_its_sequences(engine):
    call = engine.submit(MIXED)

    call.wait()

    assert [answer.sequence.sink for answer in call._answers] == [discard] * 3


def test_a_call_that_was_cancelled_lets_go_of_its_sequences(endless):
    call = endless.submit([lorax.GenerateRequest(prompt=[at], ignore_eos=True) for at in (5, 6)])

    call.cancel()

    assert [answer.sequence.sink for answer in call._answers] == [discard] * 2


class ToldOfWaits(threading.Condition):
    """A condition that tells how often somebody began to wait for it."""

    def __init__(self):
        super().__init__()
        self.waits = threading.Semaphore(0)

    def wait(self, timeout=None):
        self.waits.release()  # the lock is still held: whoever takes it next finds the waiter waiting
        return super().wait(timeout)


def test_who_waits_while_another_thread_takes_the_last_answer_is_woken():
    call = Call(1, abort=lambda sequences: None)
    call._changed = ToldOfWaits()
    sequence = make_sequence([5])
    call.start([Prepared(sequence, lambda values: values)], submit=lambda sequences: None)
    found = []
    waiting = threading.Thread(target=lambda: found.extend(call.wait()), daemon=True)
    waiting.start()
    assert call._changed.waits.acquire(timeout=LIMIT)

    with call._changed:  # the other thread wakes, and finds that this one has taken the answer
        sequence.sink(SequenceUpdate(answer="it"))
        taken = call._pop()
    assert call._changed.waits.acquire(timeout=LIMIT)
    call._take(*taken)

    waiting.join(LIMIT)
    assert found == call.wait() == ["it"]


def started_call():
    """A call of one generating request that has started, with the sink of its sequence."""
    call = Call(1, abort=lambda sequences: None)
    sequence = make_sequence([5])
    call.start([Prepared(sequence, lambda values: values)], submit=lambda sequences: None)
    return call, sequence


def test_who_waits_for_the_end_is_woken_by_the_end_alone():
    call, sequence = started_call()
    call._changed = ToldOfWaits()
    waiting = threading.Thread(target=call.wait, daemon=True)
    waiting.start()
    assert call._changed.waits.acquire(timeout=LIMIT)
    woken = []
    call._wake = lambda wake=call._wake: (woken.append(call._coming), wake())

    for token in range(5):
        sequence.sink(SequenceUpdate(token_ids=(token,)))
    sequence.sink(SequenceUpdate(token_ids=(5,), finish_reason=lorax.FinishReason.STOP))

    waiting.join(LIMIT)
    assert not waiting.is_alive()
    assert woken[0] == 0


def test_who_waits_for_the_end_takes_no_event_from_whoever_waits_for_each():
    call, sequence = started_call()
    call._changed = ToldOfWaits()
    found = []
    threads = [threading.Thread(target=lambda: found.append(call.next_event()), daemon=True)]
    threads.append(threading.Thread(target=call.wait, daemon=True))
    for thread in threads:
        thread.start()
        assert call._changed.waits.acquire(timeout=LIMIT)

    sequence.sink(SequenceUpdate(token_ids=(7,)))
    threads[0].join(LIMIT)
    sequence.sink(SequenceUpdate(token_ids=(8,), finish_reason=lorax.FinishReason.STOP))
    threads[1].join(LIMIT)

    assert [event.token_ids for event in found] == [[7]]
    assert not any(thread.is_alive() for thread in threads)


class CancelledLate(Call):
    """An update comes when `cancel` has taken all there were."""

    def _take_all(self):
        super()._take_all()
        if not self._cancelled:
            self._answers[0].sequence.sink(SequenceUpdate(token_ids=(1,), finish_reason=lorax.FinishReason.STOP))


def test_an_update_that_comes_while_a_call_is_cancelled_is_dropped():
    call = CancelledLate(1, abort=lambda sequences: None)
    sequence = make_sequence([5])
    call.start([Prepared(sequence, lambda values: values)], submit=lambda sequences: None)

    call.cancel()

    for _ in range(2):
        with pytest.raises(lorax.LoraxError, match="was cancelled"):
            call.next_event()
    assert call._open == 0


def test_a_call_that_is_cancelled_while_its_last_update_is_taken_ends():
    call, sequence = started_call()
    usual = call._account
    call._account = lambda *taken: (usual(*taken), call.cancel())  # as a signal handler does

    sequence.sink(SequenceUpdate(token_ids=(1,), finish_reason=lorax.FinishReason.STOP))

    call.wait(LIMIT)
    assert call._open == 0


def test_what_came_since_the_last_event_is_one_event():
    call, sequence = started_call()

    for token in range(3):
        sequence.sink(SequenceUpdate(token_ids=(token,), text=f"{token} "))
    first = call.next_event()
    sequence.sink(SequenceUpdate(token_ids=(3,), text="3"))
    sequence.sink(SequenceUpdate(error=lorax.StepError("broken", results=[])))
    second = call.next_event()

    assert (first.text, first.token_ids, first.finish_reason) == ("0 1 2 ", [0, 1, 2], None)
    # What came before an error is shown before it.
    assert (second.text, second.token_ids, second.finish_reason) == ("3", [3], None)
    with pytest.raises(lorax.StepError, match="broken"):
        call.next_event()


def test_cancelled_sequences_leave_the_numbers_of_the_last_step(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=512) as engine:
        stream = engine.stream([1, 2, 3], max_tokens=400, ignore_eos=True)
        next(stream)

        stream.close()
        engine._worker.call(lambda loop: None)  # what was asked for before has been done
        engine._worker.call(lambda loop: None)

        assert (engine.info().last_step.running, engine.info().last_step.pages_used) == (0, 0)


def test_one_request_in_place_of_a_list_is_refused_by_what_it_is(engine):
    with pytest.raises(lorax.RequestError, match="one GenerateRequest where a list belongs"):
        engine.submit(lorax.GenerateRequest(prompt=[1]))


def test_a_time_limit_may_be_infinite_and_must_be_a_number(engine):
    call = engine.submit([lorax.GenerateRequest(prompt=[1, 2], max_tokens=2)])

    with pytest.raises(lorax.RequestError, match="timeout: a number of seconds"):
        call.wait(float("nan"))
    assert len(within(LIMIT, lambda: call.wait(float("inf")))) == 1


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often other threads wake it."""

    def __init__(self):
        super().__init__()
        self.woken = 0

    def call_soon_threadsafe(self, *args, **kwargs):
        self.woken += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def test_a_step_wakes_an_event_loop_once_for_all_its_calls(engine):
    async def several():
        calls = [engine.submit([lorax.GenerateRequest(prompt=[5], max_tokens=20, ignore_eos=True)]) for _ in range(6)]

        async def follow(call):
            while await call.next_event_async() is not None:
                pass

        await asyncio.gather(*map(follow, calls))

    loop, before = CountingLoop(), engine.info().totals.steps
    try:
        loop.run_until_complete(several())
    finally:
        loop.close()

    assert loop.woken <= engine.info().totals.steps - before + 1
