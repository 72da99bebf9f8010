"""Calls that are cancelled at the worst of times: nobody hangs, others are answered as ever, and every page comes back."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from builders import make_lora, make_qwen2_model
from fakes import ObservedBackend, make_backend_spec, with_backends
from rigs import make_sequence, within

import lorax_core as lorax
from lorax_core.engine.sequence import discard
from lorax_core.serving.call import Call
from lorax_core.serving.prepare import Prepared

LIMIT = 120  # seconds: for a call that hangs, not for one that is slow
PROBE = [lorax.GenerateRequest(prompt=[5, 6, 7], max_tokens=4, ignore_eos=True), lorax.EmbedRequest(input=[7, 8])]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    model, root = make_qwen2_model(), tmp_path_factory.mktemp("adapters")
    return {name: str(make_lora(model, root / name, seed=at)) for at, name in enumerate("abc")}


@pytest.fixture
def engine(qwen2, host, adapters, monkeypatch):
    """An engine of few pages and few seats, in which sequences wait, are preempted, and wait for adapters to be bound."""
    monkeypatch.setattr(ObservedBackend, "during", staticmethod(lambda ids: False))
    plugins = with_backends(host, make_backend_spec("observed", "ObservedBackend"))
    options = {"kv_cache_tokens": 256, "max_batch_rows": 6, "max_batch_tokens": 32, "max_adapters": 2}
    with lorax.load(qwen2, host=plugins, attention="observed", adapters=adapters, **options) as engine:
        yield engine


def requests(rng):
    """A few requests of every kind."""
    made = []
    for _ in range(rng.randint(1, 4)):
        prompt, adapter = [rng.randrange(256) for _ in range(rng.randint(1, 60))], rng.choice([None, "a", "b", "c"])
        if rng.random() < 0.3:
            made.append(lorax.EmbedRequest(input=prompt, adapter=adapter))
            continue
        options = rng.choice([{}, {"n": 3, "temperature": 1.0}, {"choice": ["yes", "no"]}, {"prompt_logprobs": 1}])
        length = rng.randint(1, 100)
        made.append(lorax.GenerateRequest(prompt=prompt, adapter=adapter, max_tokens=length, **options))
    return made


def settled(engine):
    """Waits for the engine to have no sequence left; all of its books must be as they were before the first."""

    def look(loop):
        loop.scheduler.check()
        allocator = loop.scheduler.allocator
        seen.append((len(loop.scheduler), allocator.capacity - allocator.available, len(loop._texts)))

    seen = []
    while not seen or seen[-1][0]:
        engine._worker.call(look)
    engine.adapters.check()
    return seen[-1] == (0, 0, 0)


def outcome(call):
    try:
        return call.wait(LIMIT)
    except lorax.LoraxError as error:
        return error


def same(found, expected):
    return found[0].token_ids == expected[0].token_ids and abs(found[1].vector - expected[1].vector).max() < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_are_cancelled_at_any_moment_by_many_threads_leave_nothing_behind(engine, seed):
    expected = engine.run(PROBE)
    rng = random.Random(seed)

    def one(own):
        rng = random.Random(own)
        call = engine.submit(requests(rng))
        for _ in range(rng.choice([0, 0, 1, 2, 9])):
            try:
                if call.next_event() is None:
                    break
            except lorax.LoraxError:
                break
        for _ in range(rng.choice([1, 1, 2])):
            call.cancel()
        return outcome(call), call.done

    def probe(_):
        return same(engine.run(PROBE), expected)

    with ThreadPoolExecutor(6) as pool:
        cancelled = [pool.submit(one, rng.random()) for _ in range(40)]
        probes = [pool.submit(probe, at) for at in range(10)]
        ended = [future.result(LIMIT) for future in cancelled]
        unharmed = [future.result(LIMIT) for future in probes]

    assert all(done for _, done in ended)
    assert all(isinstance(found, (list, lorax.LoraxError)) for found, _ in ended)
    assert all(unharmed)
    assert within(LIMIT, lambda: settled(engine))
    assert same(engine.run(PROBE), expected)


@pytest.mark.parametrize("seed", range(3))
def test_tasks_that_are_cancelled_at_any_moment_leave_nothing_behind(engine, seed):
    expected = engine.run(PROBE)
    rng = random.Random(seed)

    async def awaiting():
        return await engine.submit(requests(rng))

    async def streaming():
        made = lorax.GenerateRequest(prompt=[rng.randrange(256)], max_tokens=60, ignore_eos=True)
        return [event async for event in engine.stream(made.prompt, max_tokens=made.max_tokens, ignore_eos=True)]

    async def all_of_them():
        tasks = [asyncio.create_task(rng.choice([awaiting, streaming])()) for _ in range(30)]
        while not all(task.done() for task in tasks):
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            task = rng.choice(tasks)
            task.cancel()
            if rng.random() < 0.3:
                task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(all_of_them(), LIMIT))

    assert all(isinstance(one, (list, asyncio.CancelledError, lorax.LoraxError)) for one in found)
    assert within(LIMIT, lambda: settled(engine))
    assert same(engine.run(PROBE), expected)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_call_that_is_cancelled_in_the_middle_of_a_step_takes_nothing_of_it(engine, monkeypatch, step, breaks):
    expected = engine.run(PROBE)
    ready, steps, others = threading.Event(), [], []

    def during(ids):
        if 99 in ids[:1] or steps:
            assert ready.wait(LIMIT)
            steps.append(ids)
            if len(steps) == step:
                call.cancel()
                return breaks
        return False

    monkeypatch.setattr(ObservedBackend, "during", staticmethod(during))
    made = [
        lorax.GenerateRequest(prompt=[99, 5, 6], max_tokens=40, n=3, temperature=1.0, ignore_eos=True),
        lorax.GenerateRequest(prompt=[99, 8], max_tokens=40, ignore_eos=True, adapter="a"),
    ]
    call = engine.submit(made)
    others.append(engine.submit(PROBE))
    ready.set()

    error = outcome(call)

    assert isinstance(error, lorax.LoraxError)
    assert "cancelled" in str(error)
    assert same(within(LIMIT, others[0].wait), expected)
    assert within(LIMIT, lambda: settled(engine))


def test_many_threads_may_cancel_one_call_while_others_wait_for_it(engine):
    for _ in range(20):
        call = engine.submit([lorax.GenerateRequest(prompt=[5], max_tokens=200, n=4, temperature=1.0, ignore_eos=True)])
        barrier = threading.Barrier(8)

        def act(at, call=call, barrier=barrier):
            barrier.wait(LIMIT)
            if at % 2:
                call.cancel()
            return outcome(call)

        with ThreadPoolExecutor(8) as pool:
            found = [future.result(LIMIT) for future in [pool.submit(act, at) for at in range(8)]]

        assert len({str(one) for one in found}) == 1
        assert "cancelled" in str(found[0])
    assert within(LIMIT, lambda: settled(engine))


def test_a_call_may_be_cancelled_in_the_engines_own_thread(engine):
    call = engine.submit([lorax.GenerateRequest(prompt=[5], max_tokens=200, ignore_eos=True)])

    within(LIMIT, lambda: engine._worker.call(lambda loop: call.cancel()))

    assert "cancelled" in str(outcome(call))
    assert within(LIMIT, lambda: settled(engine))


def test_cancelling_and_starting_at_once_leave_no_sequence_that_nobody_waits_for():
    for _ in range(300):
        submitted, aborted = [], []
        call = Call(1, aborted.extend)
        prepared = [Prepared(make_sequence([5], 3))]
        barrier = threading.Barrier(2)

        def start(call=call, prepared=prepared, submitted=submitted, barrier=barrier):
            barrier.wait(LIMIT)
            call.start(prepared, submitted.extend)

        thread = threading.Thread(target=start)
        thread.start()
        barrier.wait(LIMIT)
        call.cancel()
        thread.join(LIMIT)

        assert call.done
        assert aborted == submitted  # started and taken out again, or never started
        if submitted:
            assert submitted[0].sink is discard
        assert "cancelled" in str(outcome(call))


def test_a_call_that_was_cancelled_before_it_failed_to_start_stays_cancelled():
    call = Call(2, list)

    call.cancel()
    call.fail(lorax.AdapterError("gone"))
    call.cancel()

    assert "cancelled" in str(outcome(call))


@pytest.mark.parametrize("seed", range(3))
def test_closing_the_engine_while_calls_are_cancelled_ends_all_of_them(qwen2, adapters, seed):
    rng = random.Random(seed)
    engine = lorax.load(qwen2, kv_cache_tokens=256, max_batch_rows=4, adapters=adapters, max_adapters=1)
    calls = [engine.submit(requests(rng)) for _ in range(20)]
    streams = [engine.stream([5], max_tokens=100, ignore_eos=True) for _ in range(5)]
    barrier = threading.Barrier(4)

    def act(at):
        barrier.wait(LIMIT)
        if at == 0:
            engine.close()
            return []
        for stream in streams:
            stream.close()
        for call in random.Random(at).sample(calls, len(calls)):
            call.cancel()
        return [outcome(call) for call in calls]

    with ThreadPoolExecutor(4) as pool:
        found = [future.result(LIMIT) for future in [pool.submit(act, at) for at in range(4)]]

    assert all(call.done for call in calls)
    assert [len(one) for one in found] == [0, 20, 20, 20]
    assert all(isinstance(one, (list, lorax.LoraxError)) for ended in found for one in ended)
    allocator = engine._worker._stepper.loop.scheduler.allocator
    assert allocator.available == allocator.capacity
    with pytest.raises(lorax.RequestError, match="closed"):
        engine.run(PROBE)


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_are_cancelled_while_their_adapters_are_fetched_leave_nothing_behind(engine, adapters, seed):
    expected = engine.run(PROBE)
    rng = random.Random(seed)

    def one(own):
        rng = random.Random(own)
        # A folder's path is a source, so it is fetched when it is first named.
        call = engine.submit(
            [
                lorax.GenerateRequest(prompt=[5], max_tokens=50, adapter=adapters[rng.choice("abc")]),
                lorax.GenerateRequest(prompt=[6], max_tokens=9, adapter={adapters["a"]: 0.5, "b": 0.5}),
                *PROBE,
            ]
        )
        if rng.random() < 0.7:
            if rng.random() < 0.5:
                call.next_event()
            call.cancel()
            call.cancel()
        return outcome(call)

    with ThreadPoolExecutor(6) as pool:
        found = [future.result(LIMIT) for future in [pool.submit(one, rng.random()) for _ in range(24)]]

    ended = [one for one in found if isinstance(one, list)]
    assert all(isinstance(one, list) or "cancelled" in str(one) for one in found)
    assert all(same(one[2:], expected) for one in ended)
    assert within(LIMIT, lambda: settled(engine))
    assert same(engine.run(PROBE), expected)


def test_a_stream_that_is_closed_by_another_thread_ends_for_who_waits(engine):
    for _ in range(10):
        stream = engine.stream([5], max_tokens=200, ignore_eos=True)
        first = threading.Event()

        def consume(stream=stream, first=first):
            try:
                for _ in stream:
                    first.set()
            except lorax.LoraxError as error:
                return str(error)
            return "ended"

        with ThreadPoolExecutor(4) as pool:
            reading = pool.submit(consume)
            assert first.wait(LIMIT)
            closing = [pool.submit(stream.close) for _ in range(3)]
            assert [future.result(LIMIT) for future in closing] == [None] * 3
            assert reading.result(LIMIT) == "ended" or "cancelled" in reading.result()
    assert within(LIMIT, lambda: settled(engine))
