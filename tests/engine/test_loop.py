from __future__ import annotations

import pytest
import torch
from builders import make_byte_tokenizer, make_lora, make_qwen2_model
from fakes import EchoedStep, FlakyBackend, Illiterate, PagedEcho, echoed
from rigs import finish, make_adapters, make_loaded, make_loop, make_sequence
from torch.overrides import TorchFunctionMode

from lorax_core.engine.drafting import PromptLookup
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Answer
from lorax_core.engine.sampler import SampledToken
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.sequence import Sampling
from lorax_core.errors import StepError
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.types import FinishReason

PROMPT = [104, 101, 108, 108, 111]
BAD = 7  # the token that flaky kernels stumble over
TOKENIZER = make_byte_tokenizer()


class Decoder:
    """Ids to text, special tokens left out."""

    def decode(self, ids):
        return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


def written(base, prompt, count, **options):
    """What the model writes when it is alone."""
    return finish(make_loop(base, pages=64), make_sequence(prompt, count, **options))[0]


def texts(base, *sequences, **options):
    finish(make_loop(base, decoder=Decoder(), **options), *sequences)
    return [sequence.sink.text for sequence in sequences]


def prompts(count):
    return [[(at * 7 + step) % 250 + 8 for step in range(1 + at * 5 % 23)] for at in range(count)]


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_tokens": 512, "max_rows": 64, "pages": 64},
        {"max_tokens": 7, "max_rows": 64, "pages": 64},
        {"max_tokens": 64, "max_rows": 2, "pages": 64},
        {"max_tokens": 64, "max_rows": 16, "pages": 9, "page_size": 8},
        {"max_tokens": 5, "max_rows": 3, "pages": 14, "page_size": 4},
    ],
    ids=["all at once", "small steps", "few rows", "few pages", "little of all"],
)
def test_a_batch_of_any_shape_writes_what_each_prompt_gets_alone(base, sizes):
    expected = [written(base, prompt, 20) for prompt in prompts(8)]

    found = finish(make_loop(base, **sizes), *(make_sequence(prompt, 20) for prompt in prompts(8)))

    assert found == expected


def test_sampled_text_is_the_same_alone_in_a_batch_and_after_it_was_computed_again(base):
    def make(at):
        sampling = Sampling(temperature=1.0, top_p=0.9 if at % 2 else 1.0, seed=at)
        return make_sequence(prompts(6)[at], 20, sampling=sampling)

    expected = [finish(make_loop(base), make(at))[0] for at in range(6)]

    assert finish(make_loop(base), *(make(at) for at in range(6))) == expected
    assert finish(make_loop(base, pages=9, page_size=8), *(make(at) for at in range(6))) == expected


def test_a_prompt_whose_beginning_is_cached_is_continued_in_the_same_way(base):
    shared = list(range(20, 60))
    expected = written(base, [*shared, 99], 12)
    loop = make_loop(base)
    finish(loop, make_sequence([*shared, 1], 3))
    again = make_sequence([*shared, 99], 12)

    assert finish(loop, again) == [expected]
    assert again.reused == 32


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.4, seed=3)])
def test_drafting_writes_the_same(base, sampling):
    prompt = [9, 8, 7, 6] * 4
    sequence = make_sequence(prompt, 40, sampling=sampling)
    sequence.drafter = PromptLookup(most=4, ngram=1)
    loop = make_loop(base)

    assert finish(loop, sequence) == [written(base, prompt, 40, sampling=sampling)]
    assert loop.totals.steps == 1 + 39 - sequence.accepted_drafts


def test_text_is_that_of_the_tokens(base):
    sequence = make_sequence(PROMPT, 30)

    [text] = texts(base, sequence)

    assert text == Decoder().decode(sequence.output)
    assert sequence.sink.tokens == sequence.output
    assert sequence.sink.updates[-1].finish_reason is FinishReason.LENGTH
    assert all(update.finish_reason is None for update in sequence.sink.updates[:-1])


def test_a_stop_token_ends_the_text_and_is_no_part_of_it(base):
    free = written(base, PROMPT, 30)
    end = next(token for token in free[3:] if chr(token % 128).isprintable() and token < 256)
    place = free.index(end)
    sequence = make_sequence(PROMPT, 30, eos=[end])

    [text] = texts(base, sequence)

    assert sequence.output == free[: place + 1]
    assert text == Decoder().decode(free[:place])
    assert sequence.sink.updates[-1].finish_reason is FinishReason.STOP


def test_a_stop_string_ends_the_text_before_it_wherever_its_tokens_are_cut(base):
    free = written(base, PROMPT, 30)
    whole = Decoder().decode(free)
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    sequence = make_sequence(PROMPT, 30, stop=[middle])

    [text] = texts(base, sequence)

    assert text == whole[: whole.find(middle)]
    assert len(sequence.output) < 30
    assert sequence.sink.updates[-1].finish_reason is FinishReason.STOP


def test_text_that_began_a_stop_string_is_shown_when_the_answer_ends(base):
    free = written(base, PROMPT, 12)
    whole = Decoder().decode(free)
    sequence = make_sequence(PROMPT, 12, stop=[whole[-2:] + "never"])

    [text] = texts(base, sequence)

    assert text == whole
    assert sequence.sink.updates[-1].finish_reason is FinishReason.LENGTH


def test_without_a_decoder_there_are_tokens_and_no_text(base):
    sequence = make_sequence(PROMPT, 5)

    finish(make_loop(base), sequence)

    assert sequence.sink.text == ""
    assert len(sequence.sink.tokens) == 5


def test_a_step_that_breaks_ends_the_request_that_broke_it_and_no_other(base):
    backend = FlakyBackend(lambda ids: BAD in ids)
    loop = make_loop(base, backend=backend)
    others = [make_sequence(prompt, 6) for prompt in ([20, 21], [22, 23, 24])]
    broken = make_sequence([5, BAD, 5], 6)

    finish(loop, others[0], broken, others[1])

    assert isinstance(broken.sink.error, StepError)
    assert "a kernel broke" in broken.sink.error.message
    assert isinstance(broken.sink.error.__cause__, RuntimeError)
    expected = [written(base, other.prompt, 6) for other in others]
    assert [other.output[:1] for other in others] == [tokens[:1] for tokens in expected]
    assert all(BAD in tokens or other.output == tokens for other, tokens in zip(others, expected, strict=True))
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity
    assert finish(loop, make_sequence([30, 31], 4)) == [written(base, [30, 31], 4)]


def test_nan_in_one_row_ends_that_request_and_no_other(base):
    loop = make_loop(base, backend=FlakyBackend(lambda ids: BAD in ids, silent=True))
    sound, rotten = make_sequence([20, 21], 1), make_sequence([5, BAD, 5], 1)

    finish(loop, rotten, sound)

    assert isinstance(rotten.sink.error, StepError)
    assert "NaN or infinite" in rotten.sink.error.message
    assert sound.output == written(base, [20, 21], 1)


def make_overflowing(tmp_path, base):
    """An adapter whose files are sound and with which nothing stays finite."""
    folder = make_lora(make_qwen2_model(), tmp_path / "huge", target_modules=["v_proj", "k_proj"], lora_alpha=10**39)
    return make_adapters(base, huge=folder)


def test_an_adapter_that_overflows_spoils_nothing_for_those_who_get_its_pages(base, tmp_path):
    store = make_overflowing(tmp_path, base)
    loop = make_loop(base, pages=4, adapters=store)
    rotten = make_sequence(range(20, 60), 8, adapter=store.get("huge"))
    finish(loop, rotten)
    assert isinstance(rotten.sink.error, StepError)

    found = finish(loop, *(make_sequence([at, 9], 20) for at in (20, 21)))

    assert found == [written(base, [at, 9], 20) for at in (20, 21)]


def test_an_adapter_that_overflows_and_is_cancelled_spoils_nothing_either(base, tmp_path):
    store = make_overflowing(tmp_path, base)
    loop = make_loop(base, pages=4, max_tokens=30, adapters=store)
    rotten = make_sequence(range(20, 60), 8, adapter=store.get("huge"))
    loop.add(rotten)
    loop.step()
    assert 0 < rotten.computed < 40
    loop.abort(rotten)

    found = finish(loop, *(make_sequence([at, 9], 20) for at in (20, 21)))

    assert found == [written(base, [at, 9], 20) for at in (20, 21)]


def test_an_adapter_that_overflows_in_a_step_that_breaks_spoils_nothing_either(base, tmp_path):
    store = make_overflowing(tmp_path, base)
    backend = FlakyBackend(lambda ids: BAD in ids)  # it breaks when the first layer has written its rows
    loop = make_loop(base, pages=2, adapters=store, backend=backend)
    rotten = make_sequence([*range(20, 40), BAD], 8, adapter=store.get("huge"))
    finish(loop, rotten)
    assert "a kernel broke" in rotten.sink.error.message
    backend.blows = lambda ids: False

    found = finish(loop, *(make_sequence([at, 9], 5) for at in (20, 21)))

    assert found == [written(base, [at, 9], 5) for at in (20, 21)]


def test_an_adapter_that_overflows_and_is_turned_back_spoils_nothing_either(base, tmp_path):
    store = make_overflowing(tmp_path, base)
    loop = make_loop(base, pages=4, max_tokens=20, adapters=store)
    older = make_sequence(range(30, 44), 12)
    rotten = make_sequence(range(20, 70), 8, adapter=store.get("huge"))
    for sequence in (older, rotten):
        loop.add(sequence)

    finish(loop)

    assert rotten.preemptions > 0
    assert older.output == written(base, range(30, 44), 12)


def test_an_answer_that_turns_bad_with_the_last_row_of_a_page_spoils_nothing_for_who_gets_the_page(base):
    backend = FlakyBackend(silent=True)
    loop = make_loop(base, pages=1, page_size=16, backend=backend)
    rotten = make_sequence(range(20, 34), 8)
    loop.add(rotten)
    while len(rotten) < 16:
        loop.step()
    backend.blows = lambda ids: True
    loop.step()
    backend.blows = lambda ids: False
    assert isinstance(rotten.sink.error, StepError)

    found = finish(loop, make_sequence([20, 9], 8))

    assert found == [written(base, [20, 9], 8)]


class FaultyOnce(PagedEcho):
    """The fake cache, whose first answer is a fault."""

    faults = 1

    def launch(self, step):
        answers = super().launch(step).result()
        if answers and self.faults:
            self.faults -= 1
            answers = dict.fromkeys(answers, Answer(sampled=(SampledToken(None, fault="the model gave NaN"),)))
        return EchoedStep(answers)


def test_pages_that_were_zeroed_are_not_found_again():
    scheduler = Scheduler(max_tokens=8, max_rows=4, allocator=PageAllocator(9, 4))
    loop = EngineLoop(scheduler, FaultyOnce(page_size=4))
    first, second = make_sequence(range(20), 4), make_sequence(range(20), 4)

    finish(loop, first)
    finish(loop, second)

    assert isinstance(first.sink.error, StepError)
    assert second.output == echoed(list(range(20)), 4)


class Unreachable(PagedEcho):
    """The fake cache, some of whose launches fail before anything is done: the next `failing`."""

    failing = 0

    def launch(self, step):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("the device is not there")
        return super().launch(step)


def make_unreachable(pages):
    runner = Unreachable(page_size=4)
    return EngineLoop(Scheduler(max_tokens=8, max_rows=4, allocator=PageAllocator(pages + 1, 4)), runner), runner


def test_the_runner_is_told_of_all_who_ended_though_a_launch_failed():
    loop, runner = make_unreachable(pages=8)
    sequences = [make_sequence([at, 9], 6) for at in range(3)]
    for sequence in sequences:
        loop.add(sequence)
    loop.step()
    loop.abort(sequences[0])
    runner.failing = 2  # the step, and the first of its pieces
    loop.step()
    finish(loop, make_sequence([1, 2], 9))  # the last to end

    told = [number for step in runner.steps for number in step.ended]
    assert sorted(told) == [sequence.id for sequence in sequences]


def test_pages_are_zeroed_once_though_a_step_is_done_in_pieces():
    loop, runner = make_unreachable(pages=2)
    leaving = make_sequence(range(12), 4)
    loop.add(leaving)
    loop.step()  # a part of its prompt, of which nothing is known yet
    loop.abort(leaving)
    runner.failing = 1
    prompts = [[20, 21, 22], [30, 31, 32]]  # a page each

    answers = finish(loop, *(make_sequence(prompt, 2) for prompt in prompts))

    assert answers == [echoed(prompt, 2) for prompt in prompts]
    assert sorted(page for step in runner.steps for page in step.zeros) == [1, 2]


def test_pages_are_copied_once_though_a_step_is_done_in_pieces():
    loop, runner = make_unreachable(pages=8)
    prompt = [20, 21, 22]  # the answers part in the middle of a page
    sequences = [make_sequence(prompt, 4, sampling=Sampling(choice=choice)) for choice in range(3)]
    sequences[0].forks = sequences[1:]
    loop.add(sequences[0])
    loop.step()
    runner.failing = 1

    finish(loop)

    assert [one.output for one in sequences] == [echoed(prompt, 4, choice=choice) for choice in range(3)]
    copied = [new for step in runner.steps for _, new in step.copies]
    assert len(copied) == len(set(copied)) == 2


def test_a_decoder_that_fails_ends_that_request_and_no_other(base):
    free, other = written(base, [20, 21], 8), written(base, [33, 21], 8)
    token = next(token for token in free if token not in other)
    loop = make_loop(base, decoder=Illiterate(token))
    broken, sound = make_sequence([20, 21], 8), make_sequence([33, 21], 8)

    finish(loop, broken, sound)

    assert isinstance(broken.sink.error, StepError)
    assert "cannot be read" in broken.sink.error.message
    assert sound.output == other
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


def test_a_request_that_leaves_frees_its_pages_and_hears_no_more(base):
    loop = make_loop(base)
    leaving, staying = make_sequence([20] * 30, 50), make_sequence([21], 5)
    loop.add(leaving)
    loop.add(staying)
    loop.step()
    heard = len(leaving.sink.updates)

    loop.abort(leaving)
    finish(loop)

    assert len(leaving.sink.updates) == heard
    assert leaving.finished
    assert staying.output == written(base, [21], 5)
    assert loop.scheduler.allocator.available == loop.scheduler.allocator.capacity


class Transfers(TorchFunctionMode):
    """Counts tensors on their way to a device, which are some of a GPU's dearest launches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.to
        return function(*args, **(kwargs or {}))


def test_a_step_of_many_rows_brings_no_more_tensors_than_one_of_few(base):
    counts = []

    for rows in (2, 12):
        loop = make_loop(base, max_rows=16, pages=64)
        for at in range(rows):
            loop.add(make_sequence([at + 8, 9], 4))
        loop.step()  # the prompts
        with Transfers() as transfers:
            loop.step()
        counts.append(transfers.count)

    assert counts[0] == counts[1] > 0
