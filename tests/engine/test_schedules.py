"""The oracle of the whole engine: whatever the schedule, greedy answers are transformers' token for token."""

from __future__ import annotations

import random

import pytest
import torch
from builders import make_qwen2, make_qwen2_model
from captured import CapturableBackend
from gpu.doubles.tape import Tape
from rigs import make_capturable

from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.drafting import PromptLookup
from lorax_core.engine.graphs import OFF, REPLAYED, DecodeGraphs
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sequence
from lorax_core.engine.stopping import StopRule
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.kvcache.pool import KVPool
from lorax_core.types import Task

MOST_TOKENS = 20
SCHEDULES = 100  # of each kind of model: 200 in all
KINDS = {
    "full": {"eos_token_id": None},
    "windowed": {"eos_token_id": None, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 0},
}


class Subject:
    """One model, ours and theirs, some prompts, and theirs continued."""

    def __init__(self, folder, host, **changes):
        self.base = make_capturable(make_qwen2(folder, seed=3, tokenizer=False, **changes), host)
        reference = make_qwen2_model(seed=3, **changes)
        self.prompts = make_prompts()
        self.answers = [continued(reference, prompt) for prompt in self.prompts]


def make_prompts():
    """Prompts of many lengths: repetitive ones, which can be drafted, and some that begin alike."""
    prompts = []
    for seed in range(10):
        source = random.Random(seed)
        words = 3 if seed % 3 == 0 else 60
        prompts.append([source.randrange(words) for _ in range(source.randint(1, 50))])
    return [*prompts, prompts[3][:20] + prompts[5][:10], prompts[3][:32]]


def continued(model, prompt):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MOST_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=KINDS)
def subject(request, tmp_path_factory, host):
    return Subject(tmp_path_factory.mktemp(request.param), host, **KINDS[request.param])


class Watched(Runner):
    """A runner that counts the steps which were launched before the tokens they begin with were known."""

    ahead = 0

    def launch(self, step):
        self.ahead += any(chunk.awaits_token for chunk in step.chunks)
        return super().launch(step)


def make_engine(subject, source, *, ahead, graphs):
    """An engine whose budgets and cache are anything between ample and barely enough."""
    page = source.choice([1, 2, 4, 8, 16])
    least = -(-(50 + MOST_TOKENS) // page) + 2
    allocator = PageAllocator(least + source.choice([0, 2, 10, 200]), page)
    model = subject.base.model
    spec = model.attention_specs[0]
    pool = KVPool(
        layers=len(model.attention_layers),
        pages=allocator.pages,
        page_size=page,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=torch.float32,
        device="cpu",
    )
    pool.data[:, :, 1:] = 1e4  # what was never written must never be read
    scheduler = Scheduler(
        max_tokens=source.choice([1, 3, 7, 16, 64, 256]),
        max_rows=source.choice([1, 2, 4, 16]),
        allocator=allocator,
        window=model.widest_window,
    )
    backend = CapturableBackend() if graphs else TorchBackend()
    made = DecodeGraphs(model, backend, pool, None, scheduler.max_rows, Tape) if graphs else OFF
    return EngineLoop(scheduler, Watched(model, backend, pool, graphs=made), ahead=ahead)


def make_request(subject, source, heard, drafting):
    """A prompt with perhaps an end token, a drafter, a priority, and further answers.

    `heard` gets `(sequence, expected, tokens)`.
    """
    which = source.randrange(len(subject.prompts))
    count = source.randint(1, MOST_TOKENS)
    answer = subject.answers[which][:count]
    least = source.choice([0, 0, 3])
    ends = frozenset(source.sample(answer[least:], 1)) if source.random() < 0.3 and answer[least:] else frozenset()
    if ends & set(answer[:least]):  # banned there, where the answer has it
        ends = frozenset()
    expected = answer[: next((at + 1 for at, token in enumerate(answer) if token in ends), count)]

    def one():
        tokens = []
        sequence = Sequence(
            task=Task.GENERATE,
            prompt=subject.prompts[which],
            stop=StopRule(count, token_ids=ends, min_tokens=least),
            drafter=PromptLookup(source.randint(1, 6), source.randint(1, 3)) if source.random() < drafting else None,
            priority=source.choice([0, 0, 1]),
        )
        sequence.sink = lambda update: tokens.extend(update.token_ids)
        heard.append((sequence, expected, tokens))
        return sequence

    first = one()
    first.forks = [one() for _ in range(source.choice([0, 0, 0, 1, 2]))]
    return first


def run(subject, seed, *, ahead=False, graphs=False):
    """One random schedule; what every request that was not cancelled heard, and the engine."""
    source = random.Random(seed)
    engine = make_engine(subject, source, ahead=ahead, graphs=graphs)
    # Sequences that draft wait for each result, and all others with them.
    drafting = 0.4 if not ahead else source.choice([0, 0.1])
    heard, cancelled = [], set()
    arrivals = sorted((source.randint(0, 25), number) for number in range(source.randint(1, 10)))
    for step in range(20_000):
        while arrivals and arrivals[0][0] <= step:
            arrivals.pop(0)
            engine.add(make_request(subject, source, heard, drafting))
        if engine.busy and source.random() < 0.03:
            victim = source.choice(list(engine.scheduler))
            cancelled.add(victim)
            engine.abort(victim)
        engine.step()
        engine.scheduler.check()
        if not arrivals and not engine.busy:
            return engine, [one for one in heard if one[0] not in cancelled]
    raise AssertionError("the engine never came to rest")


@pytest.mark.parametrize("first", range(0, SCHEDULES, 20))
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_planning_ahead_changes_no_answer(subject, first, graphs):
    # Graphs in every fifth: the tape is slow.
    for seed in range(first, first + 20, 5 if graphs else 1):
        engine, heard = run(subject, seed, ahead=True, graphs=graphs)

        for _, expected, tokens in heard:
            assert tokens == expected, f"schedule {seed}"
        assert engine.scheduler.allocator.available == engine.scheduler.allocator.capacity


@pytest.mark.parametrize("first", range(0, SCHEDULES, 10))
def test_greedy_answers_are_transformers_under_any_schedule(subject, first):
    for seed in range(first, first + 10):
        engine, heard = run(subject, seed)

        for _, expected, tokens in heard:
            assert tokens == expected, f"schedule {seed}"
        assert engine.scheduler.allocator.available == engine.scheduler.allocator.capacity


def test_the_schedules_meet_what_they_are_meant_to(subject):
    reused = drafted = recomputed = ahead = replayed = 0
    for seed in range(20):
        if seed < 5:
            engine, _ = run(subject, seed, ahead=True, graphs=True)
            ahead += engine._runner.ahead
            replayed += engine.totals.graphs.get(REPLAYED, 0)
        _, heard = run(subject, seed)
        reused += sum(sequence.reused > 0 for sequence, _, _ in heard)
        drafted += sum(sequence.accepted_drafts for sequence, _, _ in heard)
        recomputed += sum(sequence.preemptions for sequence, _, _ in heard)

    assert min(reused, drafted, recomputed, ahead, replayed) > 0
