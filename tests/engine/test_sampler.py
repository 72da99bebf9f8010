from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lorax_core.engine.sampler import Sampled, Scores, select_native, uniform
from lorax_core.engine.sequence import Sampling, TokenCounts
from lorax_core.engine.step_input import SamplingRow
from lorax_core.engine.transfer import Transfer

VOCAB = 12
LOGITS = st.lists(st.floats(-6, 6, width=32), min_size=VOCAB, max_size=VOCAB)


def make_logits(rows=1, vocab=VOCAB, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def make_draw(position=5, **sampling):
    return SamplingRow(Sampling(**sampling), position)


def make_counts(counts):
    """Counts of tokens: 0 for one of the prompt alone."""
    made = TokenCounts(counts)
    for token, count in counts.items():
        for _ in range(count):
            made.add(token)
    return made


def make_bits(allowed):
    """Which of the vocabulary may come next, packed as grammars give it."""
    return np.packbits(np.isin(np.arange(VOCAB), allowed), bitorder="little").tobytes()


@pytest.fixture(autouse=True, params=["readable", "native"])
def form(request, monkeypatch):
    """Every test here holds for both forms."""
    found = select_native(torch.device("cpu")) if request.param == "native" else None
    assert (found is not None) is (request.param == "native")
    monkeypatch.setitem(FORM, "native", found)


FORM = {"native": None}


def sample(logits, rows):
    transfer = Transfer()
    sampled = Sampled(logits, rows, transfer, FORM["native"])
    transfer.fetch()
    return sampled.read()


def score(logits, tokens, tops):
    transfer = Transfer()
    scores = Scores(logits, torch.tensor(tokens), tops, transfer, FORM["native"])
    transfer.fetch()
    return scores.read(tokens)


def drawn(logits, draws):
    return [token.token_id for token in sample(logits, draws)]


def frequencies(row, count=4000, **sampling):
    """How often each token is drawn over many positions."""
    tokens = drawn(row.expand(count, -1), [make_draw(position, **sampling) for position in range(count)])
    return torch.bincount(torch.tensor(tokens), minlength=row.shape[-1]) / count


def warped(row, *warpers):
    """The oracle: probabilities after transformers' own chain."""
    return LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.int64), row[None].clone())[0].softmax(-1)


def assert_drawn_as(expected, found, count=4000):
    """A loose chi-square: the statistic of sound draws stays near its degrees of freedom."""
    possible = expected > 0
    assert not found[~possible].any()
    statistic = (count * (found - expected)[possible] ** 2 / expected[possible]).sum()
    degrees = possible.sum() - 1
    assert statistic < degrees + 6 * math.sqrt(2 * degrees + 1)


def test_greedy_takes_the_largest_logit_of_each_row():
    logits = make_logits(rows=7)

    assert drawn(logits, [make_draw()] * 7) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_draws_follow_the_softmax(temperature):
    row = make_logits(seed=1)[0]

    found = frequencies(row, temperature=temperature)

    assert_drawn_as(warped(row, TemperatureLogitsWarper(temperature)), found)


FILTERS = {
    "top_k": ({"top_k": 3}, [TopKLogitsWarper(3)]),
    "top_k beyond the vocabulary": ({"top_k": 99}, []),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "typical_p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "top_k, then top_p": ({"top_k": 5, "top_p": 0.6}, [TopKLogitsWarper(5), TopPLogitsWarper(0.6)]),
    "all": (
        {"top_k": 8, "top_p": 0.9, "min_p": 0.05},
        [TopKLogitsWarper(8), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


@pytest.mark.parametrize(("sampling", "warpers"), FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_filters_leave_what_transformers_leaves(sampling, warpers, temperature):
    row = make_logits(seed=3)[0]

    found = frequencies(row, temperature=temperature, **sampling)

    assert_drawn_as(warped(row, TemperatureLogitsWarper(temperature), *warpers), found)


@settings(max_examples=100)
@given(
    st.permutations(range(VOCAB)),
    st.floats(0.05, 1),
    st.none() | st.integers(1, VOCAB + 2),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
    st.integers(0, 99),
)
def test_a_draw_is_among_the_tokens_that_every_filter_keeps(ranks, spread, top_k, top_p, min_p, position):
    row = torch.tensor(ranks) * spread
    probabilities = row.double().softmax(-1).tolist()
    order = sorted(range(VOCAB), key=lambda token: -probabilities[token])
    first = order[:top_k]
    total = sum(probabilities[token] for token in first)
    before = [sum(probabilities[token] for token in first[:rank]) / total for rank in range(len(first))]
    edge = 1e-9  # met to the last bit, an edge may fall either way
    kept = [
        token
        for token, mass in zip(first, before, strict=True)
        if mass < top_p + edge and probabilities[token] >= min_p * probabilities[order[0]] - edge
    ]

    [token] = drawn(row[None], [make_draw(position, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=3)])

    assert token in kept


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.9}, {"temperature": 1.5, "top_p": 0.8}, {"temperature": 1.0, "top_k": 4}]
)
def test_a_row_draws_the_same_alone_and_in_any_batch(sampling):
    logits = make_logits(rows=20, seed=4)
    draws = [make_draw(position, seed=position % 3, **sampling) for position in range(20)]
    mixed = [draw if at % 2 else make_draw(temperature=0.2, top_p=0.5) for at, draw in enumerate(draws)]

    together = drawn(logits, draws)

    assert together == [drawn(logits[at : at + 1], [draws[at]])[0] for at in range(20)]
    assert drawn(logits, mixed)[1::2] == together[1::2]
    assert drawn(logits.flip(0), draws[::-1]) == together[::-1]


def test_seed_choice_and_position_each_make_another_draw():
    row = torch.zeros(1, 1000)

    def token(**changes):
        settings = {"position": 3, "seed": 1, "choice": 0, **changes}
        return drawn(row, [make_draw(settings.pop("position"), temperature=1.0, **settings)])[0]

    assert token() == token()
    assert len({token(), token(seed=2), token(choice=1), token(position=4)}) == 4


def test_draws_leave_torchs_global_random_state_alone():
    before = torch.random.get_rng_state()

    frequencies(make_logits()[0], count=10, temperature=1.0)

    assert torch.equal(torch.random.get_rng_state(), before)


@given(st.integers(-(2**70), 2**70), st.integers(0, 200), st.integers(0, 10**7))
def test_a_uniform_number_is_below_one_and_always_the_same(seed, choice, position):
    number = uniform(seed, choice, position)

    assert 0 <= number < 1
    assert number == uniform(seed, choice, position)


def test_uniform_numbers_of_neighbouring_positions_fill_the_interval_evenly():
    numbers = torch.tensor([uniform(7, 0, position) for position in range(8000)])

    counts = torch.histc(numbers, bins=20, min=0, max=1)

    assert_drawn_as(torch.full((20,), 1 / 20), counts / 8000, count=8000)
    lagged = torch.corrcoef(torch.stack((numbers[:-1], numbers[1:])))[0, 1]
    assert abs(lagged) < 0.05


@settings(max_examples=100)
@given(
    LOGITS,
    st.floats(1e-12, 100),
    st.none() | st.integers(1, 10**30),
    st.floats(1e-300, 1),
    st.floats(0, 1),
    st.floats(1e-6, 1),
)
def test_whatever_the_request_may_ask_a_token_of_the_vocabulary_is_drawn(
    values, temperature, top_k, top_p, min_p, typical_p
):
    draw = make_draw(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)

    [token] = drawn(torch.tensor([values]), [draw])

    assert token in range(VOCAB)


@pytest.mark.parametrize("temperature", [1e-310, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_next_to_nothing_is_greedy(temperature, top_p):
    logits = make_logits(rows=3)

    tokens = drawn(logits, [make_draw(temperature=temperature, top_p=top_p)] * 3)

    assert tokens == logits.argmax(-1).tolist()


def test_ties_fall_the_same_way_in_every_batch():
    row = torch.zeros(1, VOCAB)
    draw = make_draw(temperature=1.0, top_k=2)

    assert len({drawn(row.expand(rows, -1), [draw] * rows)[-1] for rows in range(1, 9)}) == 1


def test_the_repetition_penalty_is_transformers():
    logits = make_logits(rows=1, seed=6)
    history = torch.tensor([[1, 4, 4, 7]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(history, logits.clone())[0]

    # Greedy over what is left each time gives the whole order.
    counts = make_counts({1: 0, 4: 2, 7: 1})
    order, banned = [], ()
    for _ in range(VOCAB):
        [token] = drawn(logits, [SamplingRow(Sampling(repetition_penalty=1.7), 4, counts, banned)])
        order.append(token)
        banned = (*banned, token)

    assert order == expected.argsort(descending=True).tolist()


def test_presence_and_frequency_count_generated_tokens_only():
    logits = torch.tensor([[3.0, 2.9, 2.8, 0.0]])

    def token(counts, **penalties):
        return drawn(logits, [SamplingRow(Sampling(**penalties), 0, make_counts(counts))])[0]

    assert token({0: 0}, presence_penalty=2.0) == 0  # it is of the prompt alone
    assert token({0: 1}, presence_penalty=0.15) == 1
    assert token({0: 1}, frequency_penalty=0.05) == 0
    assert token({0: 3, 1: 1}, frequency_penalty=0.15) == 2


def test_a_bias_lifts_or_bans_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0]])

    assert drawn(logits, [make_draw(logit_bias=((2, 5.0),))]) == [2]
    assert drawn(logits, [make_draw(logit_bias=((0, -100.0),))]) == [1]
    assert drawn(logits, [SamplingRow(Sampling(), 0, banned=(0, 1))]) == [2]


def test_what_a_grammar_forbids_is_not_drawn():
    allowed = make_bits([3, 8])

    tokens = drawn(
        make_logits().expand(50, -1), [SamplingRow(Sampling(temperature=5.0), at, allowed=allowed) for at in range(50)]
    )

    assert set(tokens) == {3, 8}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_of_rubbish_is_told_and_its_neighbours_are_served(value):
    logits = make_logits(rows=3)
    logits[1, 4] = value

    picked = sample(logits, [make_draw(), make_draw(temperature=1.0, logprobs=2), make_draw(temperature=1.0)])

    assert picked[1].token_id is None
    assert "NaN or infinite" in picked[1].fault
    assert picked[0].token_id == logits[0].argmax()
    assert picked[2].token_id is not None


def test_a_row_with_nothing_allowed_is_reported():
    picked = sample(make_logits(), [SamplingRow(Sampling(), 0, allowed=make_bits([]))])

    assert picked[0].token_id is None
    assert picked[0].fault == "no token is allowed here"


def test_logprobs_are_the_models_own_whatever_the_sampling():
    logits = make_logits(rows=2)
    expected = logits.log_softmax(-1)
    one = Sampling(temperature=3.0, top_k=2, logit_bias=((0, 50.0),), logprobs=3)

    picked = sample(logits, [SamplingRow(one, 0), make_draw()])

    told = picked[0].logprobs
    assert told.token_id == picked[0].token_id == 0
    assert told.logprob == pytest.approx(expected[0, 0].item(), abs=1e-6)
    top = expected[0].topk(3)
    assert list(told.top) == top.indices.tolist()
    assert list(told.top.values()) == pytest.approx(top.values.tolist(), abs=1e-6)
    assert picked[1].logprobs is None


def test_scores_ask_for_no_more_than_there_is():
    logits = make_logits(rows=2)

    found = score(logits, [1, 2], [VOCAB + 50, 0])

    assert len(found[0].top) == VOCAB
    assert found[1].top == {}


@pytest.mark.parametrize("setting", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_a_token_that_the_model_rules_out_stays_so_under_penalties(setting):
    logits = make_logits()
    logits[0, 3] = float("-inf")
    row = make_draw(temperature=0.0, **{setting: 1.3})

    found = sample(logits, [replace(row, counts=make_counts({3: 1, 5: 1}))])

    assert found[0].token_id == int(logits[0].argmax())


def test_a_token_drawn_from_the_whole_vocabulary_has_its_own_logprob():
    logits = torch.linspace(0, 1, 5000).expand(4, -1).contiguous()

    found = sample(logits, [make_draw(at, temperature=1.0, top_p=0.99, logprobs=1) for at in range(4)])

    own = logits[0].log_softmax(-1)
    for one in found:
        assert one.logprobs.logprob == pytest.approx(own[one.token_id].item(), abs=1e-5)
    assert len({one.token_id for one in found}) > 1
