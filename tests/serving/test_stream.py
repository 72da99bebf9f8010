from __future__ import annotations

import asyncio
import gc
import signal
import threading

import pytest
from builders import make_qwen2
from fakes import make_backend_spec, with_backends
from rigs import make_sequence, within

import lorax_core as lorax
from lorax_core.engine.sequence import SequenceUpdate
from lorax_core.serving.call import Call
from lorax_core.serving.prepare import Prepared
from lorax_core.serving.stream import Stream
from lorax_core.types import FinishReason

LIMIT = 60  # seconds: for a call that hangs, not for one that is slow
BAD = 13


@pytest.fixture(scope="module")
def engine(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """An engine with one seat and room for texts that take minutes: who does not leave it keeps everybody waiting."""
    folder = make_qwen2(tmp_path_factory.mktemp("endless"), max_position_embeddings=60_000)
    with lorax.load(folder, kv_cache_tokens=60_000, max_batch_rows=1) as engine:
        yield engine


def seat_is_free(engine):
    """Whether nobody is left in the engine, and somebody else is served."""
    left = []
    engine._worker.call(lambda loop: left.extend(loop.scheduler))
    return not left and len(within(LIMIT, lambda: engine.generate([9], max_tokens=2)).token_ids) > 0


def test_events_together_are_the_completion(engine):
    events = list(engine.stream("hello", max_tokens=20, ignore_eos=True))

    completion = engine.generate("hello", max_tokens=20, ignore_eos=True)
    assert [token for event in events for token in event.token_ids] == completion.token_ids
    assert "".join(event.text for event in events) == completion.text
    assert [event.finish_reason for event in events] == [*[None] * (len(events) - 1), FinishReason.LENGTH]
    last = events[-1].completion
    assert (last.text, last.token_ids) == (completion.text, completion.token_ids)
    assert all(event.completion is None for event in events[:-1])


def test_several_prompts_are_streamed_side_by_side(engine):
    prompts = ["hello", [5, 6, 7], "x"]

    events = list(engine.stream(prompts, max_tokens=6, ignore_eos=True))

    completions = engine.generate(prompts, max_tokens=6, ignore_eos=True)
    for index, completion in enumerate(completions):
        mine = [event for event in events if event.index == index]
        assert [token for event in mine for token in event.token_ids] == completion.token_ids
        assert mine[-1].completion.text == completion.text
    # A slow reader gets several tokens in one event, but each prompt in its turn.
    assert [event.index for event in events[:3]] == [0, 1, 2]


def test_text_of_a_stream_is_never_half_a_character(engine):
    text = "".join(event.text for event in engine.stream("é", max_tokens=60, ignore_eos=True, temperature=3.0, seed=1))

    assert text == engine.generate("é", max_tokens=60, ignore_eos=True, temperature=3.0, seed=1).text


def test_a_stream_may_be_awaited(engine):
    async def collect():
        return [event async for event in engine.stream(["hello", "x"], max_tokens=8)]

    events = asyncio.run(asyncio.wait_for(collect(), LIMIT))

    plain = engine.generate(["hello", "x"], max_tokens=8)
    # How many tokens an event has is a matter of time; which they are is not.
    for index, completion in enumerate(plain):
        assert [token for one in events if one.index == index for token in one.token_ids] == completion.token_ids


def test_many_streams_share_one_event_loop(engine):
    async def tokens(prompt):
        return [token async for event in engine.stream(prompt, max_tokens=6) for token in event.token_ids]

    async def together():
        return await asyncio.gather(*(tokens([at, 9]) for at in range(10)))

    found = asyncio.run(asyncio.wait_for(together(), LIMIT))

    assert found == [engine.generate([at, 9], max_tokens=6).token_ids for at in range(10)]


def test_a_stream_that_is_closed_gives_no_more_and_frees_its_seat(endless):
    stream = endless.stream([5], ignore_eos=True)
    next(stream)

    stream.close()
    stream.close()

    assert list(stream) == []
    assert seat_is_free(endless)


def test_a_stream_that_is_dropped_frees_its_seat(endless):
    stream = endless.stream([5], ignore_eos=True)
    next(stream)

    del stream
    gc.collect()

    assert seat_is_free(endless)


def test_a_stream_that_is_left_by_an_exception_frees_its_seat(endless):
    def listen():
        with endless.stream([5], ignore_eos=True) as stream:
            for _ in stream:
                raise KeyError

    with pytest.raises(KeyError):
        listen()

    assert seat_is_free(endless)


def test_a_call_that_is_interrupted_frees_its_seat(endless):
    def interrupt():
        busy = []
        while not busy:
            endless._worker.call(lambda loop: busy.extend(loop.scheduler))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    with pytest.raises(KeyboardInterrupt):
        endless.generate([5], ignore_eos=True)
    helper.join(LIMIT)

    assert seat_is_free(endless)


def test_a_task_that_is_cancelled_frees_its_seat(endless):
    async def listen():
        async with asyncio.timeout(LIMIT):
            task = asyncio.create_task(collect())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    async def collect():
        with endless.stream([5], ignore_eos=True) as stream:
            async for _ in stream:
                started.set()

    started = asyncio.Event()
    asyncio.run(listen())

    assert seat_is_free(endless)


@pytest.mark.parametrize("heard", [0, 1, 5])
def test_further_answers_leave_with_the_stream(endless, heard):
    stream = endless.stream([5], ignore_eos=True, n=3, temperature=1.0)
    for _ in range(heard):
        next(stream)

    stream.close()

    assert seat_is_free(endless)


def test_further_answers_leave_with_the_stream_although_the_first_has_ended():
    first, second = make_sequence([5]), make_sequence([5])
    first.forks = [second]
    left = []
    call = Call(1, left.extend)
    call.start([Prepared(first)], lambda sequences: None)
    stream = Stream(call)
    first.finished = True
    first.sink(SequenceUpdate(token_ids=(7,), finish_reason=FinishReason.STOP))
    assert next(stream).choice == 0

    stream.close()

    assert left == [second]


def test_an_error_comes_after_everything_else(qwen2, host):
    host = with_backends(host, make_backend_spec("stumbling", "StumblingBackend"))
    with lorax.load(qwen2, host=host, attention="stumbling", kv_cache_tokens=512) as engine:
        sound = engine.generate([5, 6], max_tokens=4).token_ids
        stream = engine.stream([[5, BAD], [5, 6]], max_tokens=4)
        heard = []

        with pytest.raises(lorax.StepError, match="1 of 2"):
            heard.extend(iter(stream.__next__, None))

        assert list(stream) == []
    assert [token for event in heard for token in event.token_ids] == sound
    assert {event.index for event in heard} == {1}


def test_an_error_is_raised_where_a_stream_is_awaited(qwen2, host):
    host = with_backends(host, make_backend_spec("stumbling", "StumblingBackend"))

    async def collect(engine):
        return [event async for event in engine.stream([5, BAD], max_tokens=4)]

    with lorax.load(qwen2, host=host, attention="stumbling", kv_cache_tokens=512) as engine:
        with pytest.raises(lorax.StepError, match="a kernel broke"):
            asyncio.run(asyncio.wait_for(collect(engine), LIMIT))

        assert len(engine.generate([5, 6], max_tokens=2).token_ids) == 2


def test_a_bad_request_is_refused_before_the_stream_begins(engine):
    with pytest.raises(lorax.RequestError):
        engine.stream(["fine", ""], max_tokens=3)
    with pytest.raises(lorax.AdapterError):
        engine.stream(["fine", "fine"], adapter=[None, "nobody"], max_tokens=3)


def test_two_threads_that_wait_for_one_stream_are_told_apart(endless):
    stream = endless.stream([5], ignore_eos=True, max_tokens=1000)
    outcomes = []

    def consume():
        try:
            outcomes.append([event.text for event in stream])
        except lorax.RequestError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=consume, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)

    assert not any(thread.is_alive() for thread in threads)
    refused = [one for one in outcomes if isinstance(one, lorax.RequestError)]
    assert len(outcomes) == 4
    assert all("waits for the next event" in one.message and one.hint for one in refused)
    assert len(refused) < 4
    stream.close()


def test_a_second_task_that_waits_for_a_stream_is_refused_and_the_first_goes_on(engine):
    async def both():
        stream = engine.stream([5], max_tokens=6, ignore_eos=True)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)  # the first waits, or has its event already
        second = asyncio.create_task(anext(stream))
        found = await asyncio.gather(first, second, return_exceptions=True)
        return found, [event async for event in stream]

    for _ in range(20):
        (first, second), rest = asyncio.run(asyncio.wait_for(both(), LIMIT))

        assert first.index == 0
        assert isinstance(second, lorax.Event | lorax.RequestError | StopAsyncIteration)
        events = [one for one in (first, second, *rest) if isinstance(one, lorax.Event)]
        assert len(events[-1].completion.token_ids) == 6
