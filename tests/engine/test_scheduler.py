from __future__ import annotations

import pytest
from fakes import PagedEcho, digest, echoed
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import make_sequence

from lorax_core.engine.drafting import PromptLookup
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sampling, Sequence
from lorax_core.engine.stopping import StopRule
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.types import Task

PAGE = 4


class RecordingScheduler(Scheduler):
    """A scheduler that remembers its plans."""

    def __init__(self, **options):
        super().__init__(**options)
        self.plans = []

    def plan(self):
        self.plans.append(super().plan())
        return self.plans[-1]


def make_loop(*, pages=8, max_tokens=16, max_rows=4, vocab=50):
    """A step loop over a fake cache that notices every page that goes wrong."""
    allocator = PageAllocator(pages + 1, PAGE)
    scheduler = RecordingScheduler(max_tokens=max_tokens, max_rows=max_rows, allocator=allocator)
    return EngineLoop(scheduler, PagedEcho(PAGE, vocab))


def steps(loop, limit=2000):
    """Step by step until nothing is alive, the books proven after each; gives each plan as it was made."""
    for _ in range(limit):
        if not loop.busy:
            return
        loop.step()
        loop.scheduler.check()
        yield loop.scheduler.plans[-1]
    raise AssertionError("sequences are still alive")


def all_pages_are_free(loop):
    loop.scheduler.allocator.check([])
    return loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


@st.composite
def workloads(draw):
    """Requests that arrive at some step, each of which fits the cache alone; some are cancelled on the way."""
    pages = draw(st.integers(2, 10))
    requests = []
    for _ in range(draw(st.integers(1, 7))):
        prompt = draw(st.lists(st.integers(0, 3), min_size=1, max_size=pages * PAGE - 1))
        count = draw(st.integers(1, pages * PAGE - len(prompt)))
        arrives, leaves = draw(st.integers(0, 12)), draw(st.none() | st.integers(0, 12))
        requests.append((arrives, leaves, prompt, count))
    return pages, draw(st.integers(1, 20)), draw(st.integers(1, 4)), requests


@settings(max_examples=150)
@given(workloads())
def test_every_request_gets_the_tokens_that_it_would_get_alone(workload):
    pages, max_tokens, max_rows, requests = workload
    loop = make_loop(pages=pages, max_tokens=max_tokens, max_rows=max_rows)
    sequences = [make_sequence(prompt, count) for _, _, prompt, count in requests]
    cancelled = set()

    for now in range(3000):
        for (arrives, leaves, _, _), sequence in zip(requests, sequences, strict=True):
            if arrives == now:
                loop.add(sequence)
            if leaves is not None and arrives + leaves == now and not sequence.finished:
                loop.abort(sequence)
                cancelled.add(sequence)
        if now > 30 and not loop.busy:
            break
        before = {sequence: sequence.computed for sequence in loop.scheduler}
        loop.step()
        loop.scheduler.check()
        if before:
            plan = loop.scheduler.plans[-1]
            assert 1 <= plan.tokens <= max_tokens
            assert len(plan.chunks) <= max_rows
            assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
            assert all(chunk.length >= 1 for chunk in plan.chunks)

    assert not loop.busy
    assert all_pages_are_free(loop)
    for sequence in sequences:
        expected = echoed(sequence.prompt, sequence.stop.max_tokens)
        assert sequence.output == (expected[: len(sequence.output)] if sequence in cancelled else expected)


@settings(max_examples=60)
@given(st.integers(3, 8), st.integers(1, 12), st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_the_oldest_is_never_turned_back(pages, max_tokens, lengths):
    loop = make_loop(pages=pages, max_tokens=max_tokens, max_rows=8)
    room = pages * PAGE
    sequences = [
        make_sequence([at] * min(length, room - 1), room - min(length, room - 1)) for at, length in enumerate(lengths)
    ]
    for sequence in sequences:
        loop.add(sequence)

    for plan in steps(loop):
        oldest = plan.chunks[0].sequence
        assert oldest.id == min(sequence.id for sequence in [*loop.scheduler, oldest])

    assert [sequence.finished for sequence in sequences] == [True] * len(sequences)


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks():
    loop = make_loop(pages=10, max_tokens=7)
    sequence = make_sequence(range(20), 2)
    loop.add(sequence)

    chunks = [(chunk.start, chunk.length) for plan in steps(loop) for chunk in plan.chunks]

    assert chunks == [(0, 7), (7, 7), (14, 6), (20, 1)]


def test_running_answers_get_a_token_in_every_step_however_long_the_prompts_behind_them():
    loop = make_loop(pages=60, max_tokens=8, max_rows=8)
    talking = [make_sequence([at], 12) for at in range(3)]
    for sequence in talking:
        loop.add(sequence)
    loop.step()
    for at in range(3):
        loop.add(make_sequence([at] * 40, 1))

    plans = [plan for _, plan in zip(range(11), steps(loop), strict=False)]

    for plan in plans:
        lengths = {chunk.sequence: chunk.length for chunk in plan.chunks}
        assert [lengths[sequence] for sequence in talking] == [1, 1, 1]
        assert plan.tokens == 8
    assert all(sequence.finished for sequence in talking)


def test_when_pages_run_out_the_youngest_gives_way_and_its_answer_is_the_same():
    loop = make_loop(pages=6, max_tokens=32, max_rows=4)
    sequences = [make_sequence([at] * 7, 13) for at in range(3)]  # five pages each at the end, six in all
    for sequence in sequences:
        loop.add(sequence)
    was_computed, given_back = dict.fromkeys(sequences, 0), []

    for _ in steps(loop):
        given_back += [sequence for sequence in sequences if sequence.computed < was_computed[sequence]]
        was_computed = {sequence: sequence.computed for sequence in sequences}

    assert given_back
    assert sequences[0] not in given_back
    assert [sequence.output for sequence in sequences] == [echoed(sequence.prompt, 13) for sequence in sequences]


def test_a_cancelled_request_gives_its_pages_back_before_the_next_plan():
    loop = make_loop(pages=4, max_tokens=32)
    greedy = make_sequence(range(12), 4)
    loop.add(greedy)
    loop.step()
    waiting = make_sequence(range(20, 32), 4)
    loop.add(waiting)
    loop.step()
    assert waiting.computed == 0

    loop.abort(greedy)
    assert loop.scheduler.allocator.available == 4
    loop.step()

    assert waiting.computed == 12
    loop.abort(greedy)  # once more does no harm


def test_a_request_that_is_cancelled_while_it_waits_never_runs():
    loop = make_loop(max_rows=1)
    first, second = make_sequence([1], 3), make_sequence([2], 3)
    loop.add(first)
    loop.add(second)

    loop.abort(second)
    plans = list(steps(loop))

    assert all(chunk.sequence is first for plan in plans for chunk in plan.chunks)
    assert second.output == []


def test_equal_beginnings_are_computed_once_and_change_no_answer():
    loop = make_loop(pages=20, max_tokens=64)
    shared = list(range(10))
    loop.add(make_sequence([*shared, 1], 3))
    list(steps(loop))
    later = [make_sequence([*shared, 1], 3), make_sequence([*shared, 2], 3), make_sequence([9, *shared], 3)]
    for sequence in later:
        loop.add(sequence)

    first_plan = next(steps(loop))
    list(steps(loop))

    assert [sequence.reused for sequence in later] == [8, 8, 0]
    assert [chunk.start for chunk in first_plan.chunks] == [8, 8, 0]
    assert [sequence.output for sequence in later] == [echoed(sequence.prompt, 3) for sequence in later]


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8), st.integers(4, 9))
def test_reused_pages_never_change_an_answer(prompts, pages):
    loop = make_loop(pages=pages, max_tokens=9, max_rows=3)
    sequences = [make_sequence(prompt, 2) for prompt in prompts]
    for sequence in sequences:
        loop.add(sequence)

    list(steps(loop))

    assert [sequence.output for sequence in sequences] == [echoed(prompt, 2) for prompt in prompts]
    assert all_pages_are_free(loop)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=10), st.integers(2, 4), st.integers(6, 12), st.integers(1, 5))
def test_forks_share_their_prompt_and_go_their_own_ways(prompt, answers, pages, count):
    loop = make_loop(pages=pages, max_tokens=8, max_rows=3)
    sequences = [make_sequence(prompt, count, sampling=Sampling(choice=choice)) for choice in range(answers)]
    sequences[0].forks = sequences[1:]
    loop.add(sequences[0])

    list(steps(loop))

    assert [sequence.output for sequence in sequences] == [
        echoed(prompt, count, choice=choice) for choice in range(answers)
    ]
    assert all_pages_are_free(loop)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 12), st.integers(1, 9))
def test_drafts_change_no_answer(prompt, ngram, count, max_tokens):
    loop = make_loop(pages=6, max_tokens=max_tokens, vocab=2)  # two tokens: drafts are often right and often wrong
    sequence = make_sequence(prompt, count)
    sequence.drafter = PromptLookup(most=4, ngram=ngram)
    loop.add(sequence)

    plans = list(steps(loop))

    assert sequence.output == echoed(prompt, count, vocab=2)
    assert all(plan.tokens <= max_tokens for plan in plans)
    assert all_pages_are_free(loop)


def test_right_drafts_save_steps():
    loop = make_loop(pages=20, max_tokens=32, vocab=1)  # the same token over and over
    sequence = make_sequence([0] * 4, 30)
    sequence.drafter = PromptLookup(most=8, ngram=2)
    loop.add(sequence)

    plans = list(steps(loop))

    assert sequence.output == [digest([0], 1)] * 30
    assert sequence.accepted_drafts == 30 - len(plans)
    assert len(plans) < 20


def test_a_higher_priority_is_served_first_and_waiting_long_enough_beats_it():
    loop = make_loop(pages=20, max_rows=1)
    plain, urgent = make_sequence([1], 1), make_sequence([2], 1)
    urgent.priority = 1
    loop.add(plain)
    loop.add(urgent)

    order = [plan.chunks[0].sequence for plan in steps(loop)]

    assert order == [urgent, plain]
    late = make_sequence([3], 1)
    late.priority = 1
    late.turn = plain.turn + 2000
    assert plain.rank < late.rank


class WholeTexts:
    """A scheduler without a cache, as bidirectional models have it; each text is done when it was computed."""

    def __init__(self, lengths, max_tokens, max_rows=4):
        self.scheduler = Scheduler(max_tokens=max_tokens, max_rows=max_rows)
        for length in lengths:
            self.scheduler.add(Sequence(task=Task.EMBED, prompt=[1] * length, span=range(1)))

    def plans(self):
        while len(self.scheduler):
            plan = self.scheduler.plan()
            for chunk in plan.chunks:
                self.scheduler.advance(chunk)
                self.scheduler.remove(chunk.sequence)
            yield [chunk.length for chunk in plan.chunks]


def test_without_a_cache_texts_run_whole_and_one_that_is_too_long_runs_alone():
    texts = WholeTexts([3, 4, 30, 2, 5, 5], max_tokens=10)

    assert list(texts.plans()) == [[3, 4], [30], [2, 5], [5]]


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 20), st.integers(1, 5))
def test_without_a_cache_every_text_runs_once_and_in_order(lengths, max_tokens, max_rows):
    plans = list(WholeTexts(lengths, max_tokens, max_rows).plans())

    assert [length for plan in plans for length in plan] == lengths
    assert all(len(plan) <= max_rows and (sum(plan) <= max_tokens or len(plan) == 1) for plan in plans)


def test_pages_to_zero_are_not_forgotten_by_a_plan_of_nothing():
    scheduler = Scheduler(max_tokens=8, max_rows=2, allocator=PageAllocator(9, PAGE))
    leaving = make_sequence([1, 2, 3], 9)
    scheduler.add(leaving)
    scheduler.plan()
    [page] = leaving.pages
    scheduler.invalidate(leaving)
    scheduler.remove(leaving)

    assert scheduler.plan().chunks == ()  # nobody runs: those who wait, wait for their adapters
    scheduler.add(make_sequence([4], 1))

    assert scheduler.plan().zeros == (page,)
    assert scheduler.plan().zeros == ()


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (1, 0), (-3, 4)])
def test_a_step_without_room_is_refused(tokens, rows):
    with pytest.raises(ValueError, match="room for a token and a row"):
        Scheduler(max_tokens=tokens, max_rows=rows)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"stop": None}, "needs a stop rule"),
        ({"span": range(1)}, "needs a stop rule"),
        ({"prompt": []}, "at least one token"),
        ({"token_types": [0, 1]}, "has no token types"),
    ],
)
def test_a_generating_sequence_that_could_not_be_computed_is_refused(given, wrong):
    with pytest.raises(ValueError, match=wrong):
        Sequence(**{"task": Task.GENERATE, "prompt": [1, 2], "stop": StopRule(4), **given})


def make_busy_scheduler():
    loop = make_loop(pages=20)
    for at in range(3):
        loop.add(make_sequence([at] * 5, 9))
    loop.step()
    loop.add(make_sequence([7], 1))
    loop.scheduler.check()
    return loop.scheduler


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda running, waiting: running[0].pages.pop(),
        lambda running, waiting: running[1].pages.append(running[0].pages[0]),
        lambda running, waiting: setattr(running[2], "computed", 900),
        lambda running, waiting: setattr(running[0], "turn", 99),
        lambda running, waiting: setattr(waiting, "computed", 1),
    ],
    ids=["a page lost", "a page taken twice", "more computed than held", "out of order", "waiting with progress"],
)
def test_check_finds_planted_corruption(corrupt):
    scheduler = make_busy_scheduler()
    *running, waiting = scheduler
    corrupt(running, waiting)

    with pytest.raises(AssertionError):
        scheduler.check()
