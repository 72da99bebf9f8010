from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from lorax_core.attention.base import HostAndDevice
from lorax_core.attention.torch import TorchBackend
from lorax_core.kvcache.pool import KVPool
from lorax_core.modeling import Attention, Batch

DIM = 8
# (tokens in the cache, new tokens) of each sequence
STEPS = {
    "prompts": [(0, 5), (0, 1), (0, 18)],
    "chunks after cached tokens": [(6, 4), (13, 3), (16, 16)],
    "decode": [(3, 1), (17, 1), (8, 1), (15, 1), (16, 1)],
    "decode of one": [(7, 1)],
    "all kinds": [(0, 7), (5, 1), (9, 4), (20, 1), (0, 1)],
    "past the gather limit": [(600, 1), (520, 3), (3, 1), (511, 1), (512, 1)],
}
HEADS = {"each its own keys": (4, 4), "grouped": (6, 2), "one key head": (4, 1)}


def dense(q, k, v, past, *, causal=True, window=None, soft_cap=None, scale=DIM**-0.5):
    """The oracle: rows q `[rows, heads, dim]` after `past` tokens, over k and v `[past + rows, kv_heads, dim]`."""
    group = q.shape[1] // k.shape[1]
    keys = torch.arange(len(k))
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        at = past + row
        hidden = (keys > at) if causal else torch.zeros(len(k), dtype=torch.bool)
        if window is not None:
            hidden |= (keys - at).abs() >= window
        for head in range(q.shape[1]):
            scores = k[:, head // group].double() @ q[row, head].double() * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out[row, head] = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, head // group].double()
    return out.float()


def make_batch(lengths, totals):
    """A batch of sequences with so many rows each, that end after so many tokens."""
    nothing = torch.zeros(sum(lengths), dtype=torch.int64)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ends = torch.tensor(totals, dtype=torch.int32)
    return Batch(nothing, nothing, nothing, HostAndDevice(starts, starts), HostAndDevice(ends, ends))


class Step:
    """A step over sequences of random rows, their pages strewn over a cache that is full of others' numbers."""

    def __init__(self, sizes, heads, kv_heads, *, page_size=4, rubbish=1e3, **options):
        generator = torch.Generator().manual_seed(3)
        totals = [past + new for past, new in sizes]
        self.layer = Attention(heads, kv_heads, DIM, causal=True, **options)
        self.keys, self.values = (
            [torch.randn(total, kv_heads, DIM, generator=generator) for total in totals] for _ in range(2)
        )
        self.queries = [torch.randn(new, heads, DIM, generator=generator) for _, new in sizes]
        self.past = [past for past, _ in sizes]
        needed = [-(-total // page_size) for total in totals]
        free = random.Random(1).sample(range(1, sum(needed) + 4), sum(needed))
        pages = [tuple(free.pop() for _ in range(count)) for count in needed]
        pool = KVPool(
            layers=2,
            pages=sum(needed) + 4,
            page_size=page_size,
            kv_heads=kv_heads,
            head_dim=DIM,
            dtype=torch.float32,
            device="cpu",
        )
        pool.data.fill_(rubbish)
        pool.data[:, :, 0] = 0  # the scratch page, which nobody writes
        self.layer.index = 1
        slots = [
            torch.tensor([held[at // page_size] * page_size + at % page_size for at in range(total)])
            for held, total in zip(pages, totals, strict=True)
        ]
        for past, where, k, v in zip(self.past, slots, self.keys, self.values, strict=True):
            pool.write(1, k[:past], v[:past], where[:past])
        self.batch = make_batch([new for _, new in sizes], totals)
        table = torch.zeros(len(pages), max(needed), dtype=torch.int32)
        for row, held in zip(table, pages, strict=True):
            row[: len(held)] = torch.tensor(held)
        self.batch.page_table = HostAndDevice(table, table)
        self.batch.slots = torch.cat([where[past:] for past, where in zip(self.past, slots, strict=True)])
        self.pool = pool
        self.plan(self.layer.spec)

    def plan(self, *specs):
        """Plan the step for layers of these kinds."""
        backend = TorchBackend()
        backend.bind(specs, self.queries[0].dtype, self.pool)
        self.batch.attention = backend.plan(self.batch)

    def attended(self):
        """What the layer gives each sequence, `[rows, heads, dim]`."""
        new_keys, new_values = (
            torch.cat([t[past:] for past, t in zip(self.past, stored, strict=True)])
            for stored in (self.keys, self.values)
        )
        rows = self.layer(torch.cat(self.queries), new_keys, new_values, self.batch)
        return rows.view(len(rows), -1, DIM).split(self.batch.lengths)

    def assert_dense(self, **options):
        for rows, *known in zip(self.attended(), self.queries, self.keys, self.values, self.past, strict=True):
            torch.testing.assert_close(rows, dense(*known, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_paged_rows_attend_to_their_own_past(sizes, heads, window, soft_cap):
    step = Step(sizes, *heads, window=window, soft_cap=soft_cap)

    step.assert_dense(window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
def test_a_scale_of_its_own_is_folded_into_the_queries(sizes):
    step = Step(sizes, 4, 2, scale=0.7)

    step.assert_dense(scale=0.7)


def test_a_scale_is_folded_in_before_the_soft_cap():
    step = Step(STEPS["all kinds"], 4, 2, scale=0.7, soft_cap=2.0)

    step.assert_dense(scale=0.7, soft_cap=2.0)


@pytest.mark.parametrize("page_size", [1, 16, 256])
def test_the_size_of_a_page_changes_nothing(page_size):
    step = Step(STEPS["all kinds"], 4, 2, page_size=page_size)

    step.assert_dense()


@pytest.mark.parametrize("window", [1, 2, 7])
@pytest.mark.parametrize("size", [(0, 12), (6, 6), (11, 1)])
def test_a_window_ends_where_transformers_ends_it(window, size):
    past, _ = size
    step = Step([size], 1, 1, window=window)
    visible = sliding_window_causal_mask_function(window)
    mask = torch.stack([torch.stack([visible(0, 0, q, k) for k in torch.arange(12)]) for q in torch.arange(past, 12)])

    [rows] = step.attended()

    known = [t[0].transpose(0, 1) for t in (step.queries, step.keys, step.values)]  # [1, rows | keys, dim]
    torch.testing.assert_close(rows.transpose(0, 1), F.scaled_dot_product_attention(*known, mask), rtol=1e-5, atol=1e-5)


def make_texts(lengths, heads, kv_heads):
    generator = torch.Generator().manual_seed(4)
    total = sum(lengths)
    return [torch.randn(total, count, DIM, generator=generator) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("lengths", [(6,), (1, 9, 4), (1, 1)])
def test_an_encoder_row_attends_to_its_whole_text_and_to_no_other(lengths, heads, window, soft_cap):
    q, k, v = make_texts(lengths, *heads)
    layer = Attention(*heads, DIM, causal=False, window=window, soft_cap=soft_cap)
    batch, backend = make_batch(lengths, lengths), TorchBackend()
    backend.bind([layer.spec], q.dtype, None)
    batch.attention = backend.plan(batch)

    rows = layer(q, k, v, batch).view(q.shape)

    for one, *text in zip(*(t.split(lengths) for t in (rows, q, k, v)), strict=True):
        expected = dense(*text, 0, causal=False, window=window, soft_cap=soft_cap)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def windowed(lengths, window, *texts):
    """What an encoder's layer with a window makes of texts q, k and v `[tokens, heads, dim]`."""
    layer = Attention(4, 2, DIM, causal=False, window=window)
    batch, backend = make_batch(lengths, lengths), TorchBackend()
    backend.bind([layer.spec], texts[0].dtype, None)
    batch.attention = backend.plan(batch)
    return layer(*texts, batch).view(texts[0].shape)


@pytest.mark.parametrize("window", [1, 65, 300, 700])
def test_a_long_text_ends_its_windows_where_transformers_ends_them(window):
    lengths = (700, 3, 256, 257)
    texts = make_texts(lengths, 4, 2)
    visible = sliding_window_bidirectional_mask_function(window - 1)

    rows = windowed(lengths, window, *texts)

    for one, *text in zip(*(t.split(lengths) for t in (rows, *texts)), strict=True):
        at = torch.arange(len(one))
        seen = visible(0, 0, at[:, None], at) & (at >= 0)
        known = [t.transpose(0, 1)[None] for t in text]  # [1, heads, tokens, dim]
        expected = F.scaled_dot_product_attention(*known, seen, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_keys_far_outside_a_window_are_not_read():
    q, k, v = make_texts((2000,), 4, 2)
    k[:10], v[:10] = torch.nan, torch.nan

    rows = windowed((2000,), 65, q, k, v)

    assert rows[1000:].isfinite().all()
    assert not rows[:70].isfinite().any()


def test_16_bit_rows_come_out_in_16_bit_close_to_the_exact_ones():
    step = Step(STEPS["all kinds"], 4, 2)
    exact = step.attended()
    step.queries = [q.bfloat16() for q in step.queries]
    step.pool.data = step.pool.data.bfloat16()
    step.plan(step.layer.spec)

    rows = step.attended()

    for one, known in zip(rows, exact, strict=True):
        assert one.dtype is torch.bfloat16
        torch.testing.assert_close(one.float(), known, rtol=0.05, atol=0.05)


def test_layers_of_two_windows_share_one_plan():
    step = Step(STEPS["all kinds"], 4, 2)
    narrow = Attention(4, 2, DIM, causal=True, window=3)
    narrow.index = 1
    step.plan(step.layer.spec, narrow.spec)
    q, k, v = (
        torch.cat(step.queries),
        *(
            torch.cat([t[past:] for past, t in zip(step.past, stored, strict=True)])
            for stored in (step.keys, step.values)
        ),
    )

    wide_rows = step.layer(q, k, v, step.batch).view(q.shape).split(step.batch.lengths)
    narrow_rows = narrow(q, k, v, step.batch).view(q.shape).split(step.batch.lengths)

    for wide, tight, *known in zip(
        wide_rows, narrow_rows, step.queries, step.keys, step.values, step.past, strict=True
    ):
        torch.testing.assert_close(wide, dense(*known), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tight, dense(*known, window=3), rtol=1e-5, atol=1e-5)
