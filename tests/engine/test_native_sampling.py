"""The compiled form of sampling gives what the readable form gives, whatever the logits, settings and sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from compiled import compiled_for_avx2, only_on_x86
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import with_threads

from lorax_core.engine.sampler import Sampled, Scores, select_native
from lorax_core.engine.sequence import Sampling
from lorax_core.engine.step_input import SamplingRow
from lorax_core.engine.transfer import Transfer
from lorax_core.kernels.native.sampling import _SCRATCH, SOURCE, NativeSampling

CPU = torch.device("cpu")
# One token; less than a block of neighbours, one, and one more; more blocks than candidates; a part of a block at the end.
VOCABS = [1, 2, 100, 128, 129, 3000, 40_003]
# Where a share is met to the last bit, rounding decides which side a token falls on: so odd a number is never met.
SHARES = st.integers(0, 998).map(lambda thousandths: thousandths / 1000 + 0.000317)
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7, 40.0, 1e-4, 1e-12, 1e-310]),
    top_k=st.none() | st.sampled_from([1, 2, 17, 500, 2000, 10**30]),
    top_p=st.just(1.0) | SHARES,
    min_p=st.just(0.0) | st.just(1.0) | SHARES | SHARES.map(lambda share: share**8),
    typical_p=st.just(1.0) | SHARES,
    logprobs=st.none() | st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 2**53),
)


@pytest.fixture(scope="module", params=["this processor", pytest.param("AVX2", marks=only_on_x86)])
def native(request, tmp_path_factory):
    if request.param == "AVX2":
        return NativeSampling(compiled_for_avx2(SOURCE, tmp_path_factory.mktemp("avx2")))
    found = select_native(CPU)
    assert found is not None
    return found


def make_logits(seed, rows, vocab):
    """Rows as models give them and worse: steep and flat, with many ties, with tokens ruled out, with rubbish."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=random) * torch.tensor([0.0, 0.5, 3.0, 20.0])[seed % 4]
    if seed % 3 == 0:
        logits = logits.mul(2).round().div(2)  # ties, -0.0 among them
    if seed % 5 == 0:
        logits[torch.rand(rows, vocab, generator=random) < 0.5] = -math.inf
    if seed % 7 == 0:
        place = int(torch.randint(vocab, (1,), generator=random))
        logits[0, place] = torch.tensor([math.nan, math.inf, -math.inf])[seed % 3]
    return logits


def make_bits(seed, vocab):
    """A grammar's mask; it may end before the vocabulary does."""
    return np.random.default_rng(seed).integers(0, 256, -(-vocab // 8) - seed % 2 * (vocab > 8), np.uint8).tobytes()


def sample(logits, rows, native=None):
    transfer = Transfer()
    sampled = Sampled(logits, rows, transfer, native)
    transfer.fetch()
    return sampled.read()


def assert_same(found, expected):
    assert [one.token_id for one in found] == [one.token_id for one in expected]
    assert [one.fault for one in found] == [one.fault for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.logprobs is None) is (theirs.logprobs is None)
        if ours.logprobs is not None:
            assert list(ours.logprobs.top) == list(theirs.logprobs.top)
            # float32 in torch, float64 rounded here.
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, rel=1e-5, abs=1e-5)
            assert list(ours.logprobs.top.values()) == pytest.approx(
                list(theirs.logprobs.top.values()), rel=1e-5, abs=1e-5
            )


@settings(max_examples=250)
@given(st.integers(0, 10**6), st.sampled_from(VOCABS), st.lists(SETTINGS, min_size=1, max_size=4), st.booleans())
def test_it_gives_what_the_readable_form_gives(native, seed, vocab, wanted, masked):
    logits = make_logits(seed, len(wanted), vocab)
    bits = make_bits(seed, vocab) if masked else None
    rows = [SamplingRow(one, at, allowed=bits if at % 2 == 0 else None) for at, one in enumerate(wanted)]

    found = sample(logits, rows, native)

    assert_same(found, sample(logits, rows))


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.99])
@pytest.mark.parametrize("spread", [0.1, 2.0, 5.0])
def test_it_draws_what_the_readable_form_draws_from_a_large_vocabulary(native, spread, top_p):
    logits = torch.randn(1, 20_000, generator=torch.Generator().manual_seed(1)) * spread
    rows = [SamplingRow(Sampling(temperature=0.8, top_p=top_p), at) for at in range(60)]

    found = sample(logits.expand(60, -1), rows, native)

    assert_same(found, sample(logits.expand(60, -1), rows))
    assert len({one.token_id for one in found}) > 5


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.9),
        Sampling(temperature=1.1, top_p=0.97),
        Sampling(temperature=1.0, typical_p=0.8),
        Sampling(temperature=0.9, min_p=0.001, logprobs=3),
    ],
)
def test_a_row_gives_the_same_alone_in_any_batch_and_with_any_number_of_threads(native, sampling):
    logits = torch.randn(9, 10_007, generator=torch.Generator().manual_seed(2)) * 3
    rows = [SamplingRow(replace(sampling, seed=at), at) for at in range(9)]
    together = sample(logits, rows, native)
    before = torch.get_num_threads()

    torch.set_num_threads(5)
    try:
        others = sample(logits.flip(0), rows[::-1], native)[::-1]
    finally:
        torch.set_num_threads(before)

    assert others == together
    assert [sample(logits[at : at + 1], [rows[at]], native)[0] for at in range(9)] == together


def test_rows_may_lie_apart(native):
    wide = torch.randn(4, 900, generator=torch.Generator().manual_seed(3))
    rows = [SamplingRow(Sampling(temperature=1.0, logprobs=2), at, allowed=make_bits(2, 300)) for at in range(4)]

    for logits in (wide[:, 300:600], wide[:, ::3], wide[:1, :300].expand(4, -1), wide.t()[:300, :4].t()):
        assert sample(logits, rows, native) == sample(logits.contiguous(), rows, native)


def test_scores_of_a_prompt_are_those_of_the_readable_form(native):
    logits = torch.randn(5, 3001, generator=torch.Generator().manual_seed(4))
    logits[3, 7] = math.nan
    tokens = [0, 3000, 5, 1, 9]

    found, expected = ([], [])
    for form, told in ((native, found), (None, expected)):
        transfer = Transfer()
        scores = Scores(logits, torch.tensor(tokens), [2, None, 7, 1, 0], transfer, form)
        transfer.fetch()
        told += scores.read(tokens)

    assert math.isnan(found[3].logprob)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None or math.isnan(theirs.logprob):
            assert (ours is None) is (theirs is None)
            continue
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert list(ours.top) == list(theirs.top)


def test_of_equal_logits_the_first_tokens_are_the_likeliest(native):
    logits = torch.zeros(1, 2000)
    logits[0, ::2] = -0.0
    rows = [SamplingRow(Sampling(temperature=1.0, top_k=3, logprobs=4), at) for at in range(40)]

    for form in (native, None):
        found = sample(logits.expand(40, -1), rows, form)

        assert {one.token_id for one in found} == {0, 1, 2}
        assert list(found[0].logprobs.top) == [0, 1, 2, 3]


def test_top_p_is_a_share_of_what_a_large_top_k_leaves(native):
    # Of 4,000 equal tokens, 2,000 are left by top_k and 1,800 by top_p.
    rows = [SamplingRow(Sampling(temperature=1.0, top_k=2000, top_p=0.9), at) for at in range(300)]

    for form in (native, None):
        tokens = [one.token_id for one in sample(torch.zeros(300, 4000), rows, form)]

        assert 1700 < max(tokens) < 1800


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_thread_has_memory_of_its_own(threads):
    with with_threads(threads):
        scratch, shared = NativeSampling._scratch(64, 2000)

    assert shared == threads
    assert len(scratch) == threads * 2000 * _SCRATCH


@pytest.mark.parametrize("size", [0.0, 1e6, 1e15, -1e17])
def test_scores_beside_large_logits_are_not_lost(native, size):
    scores = native.score(torch.full((1, 16), size), torch.tensor([3]), 4)

    for found in scores[:2]:
        assert torch.allclose(found, torch.full_like(found, -math.log(16)))


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("LORAX_NATIVE", "0")

    assert select_native(CPU) is None
