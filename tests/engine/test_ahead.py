"""The next step is launched before the result of the last is read: who ended meanwhile, failed or left changes no answer."""

from __future__ import annotations

from array import array

import pytest
import torch
from builders import QWEN2, make_lora, make_qwen2_model
from captured import CapturableBackend, CapturableKernel
from fakes import FlakyBackend
from gpu.doubles.tape import Tape
from oracles import make_model, saved
from replays import make_chunk
from rigs import finish, kernel_for, make_adapters, make_capturable, make_loop, make_pool, make_sequence
from transformers import Qwen2ForCausalLM

from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.drafting import PromptLookup
from lorax_core.engine.graphs import OFF, DecodeGraphs
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sampling
from lorax_core.engine.step_input import HeadRead, StepInput
from lorax_core.errors import StepError
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.types import Task

PROMPTS = [[20, 21, 22], [30, 31], [40, 41, 42, 43]]


class Watched(Runner):
    """A runner that counts steps launched ahead; the result of those whose number is in `fails` cannot be read.

    With `revises` reading any result voids the step after it.
    """

    ahead = 0
    launches = 0
    fails: frozenset[int] = frozenset()
    revises = False

    def launch(self, step):
        self.launches += 1
        self.ahead += any(chunk.awaits_token for chunk in step.chunks)
        pending = super().launch(step)
        if self.launches not in self.fails:
            return Revised(pending) if self.revises else pending
        self._newest = torch.zeros_like(self._newest)  # what a failed step sampled is rubbish
        return Lost()


class Revised:
    """A step that says of its tokens that reading changed them."""

    revised = True

    def __init__(self, pending):
        self.graph, self.result = pending.graph, pending.result


class Lost:
    """A step whose computation failed after its launch, as the device reports late."""

    graph = ""
    revised = False

    def result(self):
        raise RuntimeError("the device failed")


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_capturable(qwen2, host)


def alone(base, prompt, count, **options):
    return finish(make_loop(base), make_sequence(prompt, count, **options))[0]


def ending(base, prompt):
    """The end token that makes an answer end in the middle, and the answer's length with it."""
    answer = alone(base, prompt, 12)
    at = next(at for at in range(3, 12) if answer[at] not in answer[:at])
    return answer[at], at + 1


def make_ahead(base, *, backend=None, adapters=None, pages=32, fails=(), graphs=False):
    pool = make_pool(base, pages)
    if graphs:
        backend = CapturableBackend()
    scheduler = Scheduler(max_tokens=64, max_rows=16, allocator=PageAllocator(pages + 1, pool.page_size))
    bound = adapters.bound if adapters is not None else {}
    backend = backend or TorchBackend()
    made = DecodeGraphs(base.model, backend, pool, CapturableKernel(), 4, Tape) if graphs else OFF
    runner = Watched(base.model, backend, pool, bound, kernel_for(base), made)
    runner.fails = frozenset(fails)
    return EngineLoop(scheduler, runner, ahead=True), runner


def test_decoding_steps_are_launched_ahead(base):
    loop, runner = make_ahead(base)

    answers = finish(loop, *(make_sequence(prompt, 20) for prompt in PROMPTS))

    assert answers == [alone(base, prompt, 20) for prompt in PROMPTS]
    assert runner.ahead == 19  # all but the prompts' own step, those that begin a page included
    assert runner.launches == 20


def test_a_sequence_that_ended_has_a_row_too_many_which_nobody_hears_of(base):
    loop, runner = make_ahead(base)
    token, count = ending(base, PROMPTS[0])
    first, second = make_sequence(PROMPTS[0], 12, eos=[token]), make_sequence(PROMPTS[1], 12)

    finish(loop, first, second)

    assert (len(first.output), first.output[-1]) == (count, token)
    assert second.output == alone(base, PROMPTS[1], 12)
    assert runner.launches == 12
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


def test_a_step_of_none_but_ended_sequences_is_forgotten(base):
    loop, _ = make_ahead(base)

    finish(loop, make_sequence(PROMPTS[0], 12, eos=[ending(base, PROMPTS[0])[0]]))

    steps = loop.totals.steps
    loop.step()

    assert loop.totals.steps == steps
    assert finish(loop, make_sequence(PROMPTS[1], 5)) == [alone(base, PROMPTS[1], 5)]


@pytest.mark.parametrize("revises", [False, True], ids=["sound", "void"])
@pytest.mark.parametrize("length", [3, 20], ids=["one page", "two pages"])
def test_what_a_row_too_many_left_in_the_cache_is_zeroed(base, length, revises):
    prompt = range(20, 20 + length)
    token, _ = ending(base, prompt)
    # The row too many begins with the end token, and is NaN; the next request has the same pages.
    backend = FlakyBackend(lambda ids: ids == [token], silent=True)
    loop, runner = make_ahead(base, pages=-(-length // 16), backend=backend)
    runner.revises = revises

    finish(loop, make_sequence(prompt, 12, eos=[token]))
    backend.blows = lambda ids: False

    count = length + 2 - len(PROMPTS[1])
    assert finish(loop, make_sequence(PROMPTS[1], count)) == [alone(base, PROMPTS[1], count)]


@pytest.mark.parametrize("fails", [[2], [3], [2, 3], [4, 5]])
def test_a_step_that_fails_late_is_done_in_pieces_and_what_was_launched_ahead_is_void(base, fails):
    loop, _ = make_ahead(base, fails=fails)

    answers = finish(loop, *(make_sequence(prompt, 8) for prompt in PROMPTS))

    assert answers == [alone(base, prompt, 8) for prompt in PROMPTS]


def test_a_step_that_cannot_be_launched_ahead_hits_only_whom_it_would_hit_alone(base):
    answer = alone(base, PROMPTS[0], 8)
    at = next(
        at for at in range(2, 8) if answer[at] not in answer[:at] and answer[at] not in alone(base, PROMPTS[1], 8)
    )
    loop, _ = make_ahead(base, backend=FlakyBackend(lambda ids: ids == [answer[at]]))
    first, second = make_sequence(PROMPTS[0], 12), make_sequence(PROMPTS[1], 8)

    finish(loop, first, second)

    assert isinstance(first.sink.error, StepError)
    assert first.output == answer[: at + 1]
    assert second.output == alone(base, PROMPTS[1], 8)


def test_a_launch_that_fails_leaves_the_tokens_of_the_step_before(base):
    pool = make_pool(base, 4)
    runner = Runner(base.model, TorchBackend(), pool)
    ids = array("q", PROMPTS[0])
    prompt = make_chunk(0, 0, 0, [1], tokens=ids, reads=(HeadRead(Task.GENERATE, range(len(ids) - 1, len(ids))),))
    ahead = make_chunk(0, 0, len(ids), [1], awaits_token=True)
    # An input whose earlier chunks the runner does not have: found out when all the rest is launched.
    lost = make_chunk(1, 7, 1, [2], task=Task.EMBED, reads=(), sampled=(), pooled_rows=2)
    first = runner.launch(StepInput((prompt,)))

    with pytest.raises(KeyError):
        runner.launch(StepInput((ahead, lost)))
    second = runner.launch(StepInput((ahead,)))

    found = [step.result()[1].sampled[0].token_id for step in (first, second)]
    assert found == alone(base, PROMPTS[0], 2)


def test_pages_are_zeroed_though_the_step_that_was_to_do_it_could_not_be_launched():
    allocator = PageAllocator(9, 4)
    scheduler = Scheduler(max_tokens=8, max_rows=2, allocator=allocator)
    leaving, staying = make_sequence([1, 2, 3], 9), make_sequence([4, 5], 9)
    scheduler.add(leaving)
    scheduler.add(staying)
    plan = scheduler.plan()
    [page] = leaving.pages
    scheduler.invalidate(leaving)
    scheduler.remove(leaving)

    following = scheduler.plan_ahead(plan)
    scheduler.forgo(following)

    assert following.zeros == (page,)
    assert scheduler.plan().zeros == (page,)


def test_a_void_row_is_zeroed_when_its_sequence_ends_and_overwritten_when_it_goes_on():
    scheduler = Scheduler(max_tokens=8, max_rows=2, allocator=PageAllocator(9, 4))
    ending, staying = make_sequence([1, 2], 9), make_sequence([4, 5], 9)
    scheduler.add(ending)
    scheduler.add(staying)
    plan = scheduler.plan()
    scheduler.plan_ahead(plan)  # launched, and void: reading the result of `plan` changed a token
    [page] = ending.pages
    for chunk in plan.chunks:
        chunk.sequence.append(9)
        scheduler.advance(chunk)

    scheduler.remove(ending)
    assert scheduler.plan().zeros == (page,)
    scheduler.remove(staying)

    assert scheduler.plan().zeros == ()


def test_a_sequence_that_was_launched_ahead_may_be_preempted_and_leave_while_it_waits():
    allocator = PageAllocator(3, 4)
    scheduler = Scheduler(max_tokens=16, max_rows=2, allocator=allocator)
    older, younger = make_sequence([7, 8, 9], 9), make_sequence([4, 5], 9)
    scheduler.add(older)
    scheduler.add(younger)
    plan = scheduler.plan()
    scheduler.plan_ahead(plan)  # launched, and void
    for chunk in plan.chunks:
        chunk.sequence.append(7)
        scheduler.advance(chunk)
    older.drafter = PromptLookup(4, 1)  # its drafts need a page more than was held ahead
    scheduler.plan()
    assert (younger.preemptions, scheduler.waiting) == (1, 1)

    scheduler.remove(younger)
    scheduler.check()
    scheduler.remove(older)

    assert allocator.available == allocator.capacity


def test_warming_up_in_the_middle_of_an_answer_changes_nothing(base):
    loop, _ = make_ahead(base, graphs=True)
    sequence = make_sequence(PROMPTS[0], 8)
    loop.add(sequence)
    for _ in range(3):
        loop.step()

    loop.warmup(64)
    finish(loop)

    assert sequence.output == alone(base, PROMPTS[0], 8)


def test_a_request_may_be_cancelled_and_its_adapter_go_while_its_next_token_is_computed(base, tmp_path):
    store = make_adapters(base, one=make_lora(make_qwen2_model(), tmp_path, target_modules="all-linear"))
    loop, runner = make_ahead(base, adapters=store)
    first, second = make_sequence(PROMPTS[0], 12, adapter=store.get("one")), make_sequence(PROMPTS[1], 8)
    loop.add(first)
    loop.add(second)
    for _ in range(3):
        loop.step()

    loop.abort(first)
    first.adapter = None
    store.unload("one")
    finish(loop)

    assert len(first.output) == 3
    assert second.output == alone(base, PROMPTS[1], 8)
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity
    assert runner.ahead > 3


def test_a_request_that_joins_does_so_after_the_step_that_was_launched(base):
    loop, _ = make_ahead(base)
    first, second = make_sequence(PROMPTS[0], 8), make_sequence(PROMPTS[1], 8)
    loop.add(first)
    for _ in range(3):
        loop.step()

    loop.add(second)
    for _ in range(2):  # what was launched, and then both
        loop.step()
    assert len(second.output) == 1
    finish(loop)

    assert [first.output, second.output] == [alone(base, prompt, 8) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "logprobs": 2}],
    ids=["plain", "filtered", "scored"],
)
def test_drawn_tokens_are_the_same(base, options):
    sampling = Sampling(seed=5, **options)
    loop, runner = make_ahead(base)

    [answer] = finish(loop, make_sequence(PROMPTS[0], 8, sampling=sampling))

    assert answer == alone(base, PROMPTS[0], 8, sampling=sampling)
    assert runner.ahead == 7


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_a_token_that_reading_changed_voids_what_was_launched_with_the_other(graphs, tmp_path, host, monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")  # the compiled form looks at enough tokens at once
    # More tokens than filters look at first; logits so near each other that top_p keeps most of them.
    model = make_model(Qwen2ForCausalLM, QWEN2, seed=4, vocab_size=2500)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    base = make_capturable(saved(model, tmp_path), host)
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=3)
    loop, runner = make_ahead(base, graphs=graphs)

    [answer] = finish(loop, make_sequence(PROMPTS[0], 8, sampling=sampling))

    assert answer == alone(base, PROMPTS[0], 8, sampling=sampling)
    assert runner.launches > 8  # some were launched for nothing


class Vowels:
    """A grammar that takes any of some tokens."""

    complete = False

    def allowed(self):
        return bytes([0b10101010] * 33)

    def advance(self, token_id):
        pass

    def copy(self):
        return self


def needing_the_host():
    penalised = make_sequence(PROMPTS[0], 6, sampling=Sampling(repetition_penalty=1.2))
    drafting, constrained = (make_sequence(PROMPTS[0], 6) for _ in range(2))
    drafting.drafter = PromptLookup(3, 1)
    constrained.grammar = Vowels()
    return {"penalties": penalised, "drafts": drafting, "grammar": constrained}


@pytest.mark.parametrize("name", needing_the_host())
def test_sequences_that_need_the_host_between_tokens_wait_for_each_result(base, name):
    loop, runner = make_ahead(base)
    sequence = needing_the_host()[name]

    [answer] = finish(loop, sequence)

    assert answer == finish(make_loop(base), needing_the_host()[name])[0]
    assert runner.ahead == 0


def test_forks_join_before_anything_is_launched_ahead(base):
    loop, runner = make_ahead(base)
    first, fork = (make_sequence(PROMPTS[0], 6) for _ in range(2))
    first.forks = [fork]

    finish(loop, first)

    assert first.output == fork.output == alone(base, PROMPTS[0], 6)
    assert runner.ahead > 0
