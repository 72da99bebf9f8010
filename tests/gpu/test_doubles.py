"""The doubles themselves: their numbers against formulas written out here, as the packages' own reference tests state them,
and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module

import pytest
import torch
from gpu.doubles import flash_attn_module, flashinfer_module, varlen
from gpu.doubles.backends import backends_on_cpu
from gpu.doubles.flashinfer_module import flashinfer_on_cpu
from gpu.doubles.launch import Misuse, insist_version

DIM = 64


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def written_out(q, k, v, *, causal, left=None, right=None, cap=None):
    """Attention row by row, in float64; also log-sum-exp in base 2. [rows, heads, dim], [rows, heads]."""
    rows, keys, group = len(q), len(k), q.shape[1] // k.shape[1]
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for row in range(rows):
        at = keys - rows + row  # the last row is the last key's
        first = 0 if left is None else max(0, at - left)
        end = at + 1 if causal else keys if right is None else min(keys, at + right + 1)
        for head in range(q.shape[1]) if first < end else ():
            scores = k[first:end, head // group].double() @ q[row, head].double() / math.sqrt(q.shape[-1])
            if cap:
                scores = cap * torch.tanh(scores / cap)
            weights = scores.exp() / scores.exp().sum()
            out[row, head] = weights @ v[first:end, head // group].double()
            lse[row, head] = scores.exp().sum().log2()
    return out, lse


def close(ours, theirs):
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


class Paged:
    """FlashInfer's paged wrapper over a cache of 6 pages of 4 tokens, planned for two sequences of 7 and 4 keys."""

    def __init__(self, **graph):
        self.cache = some(6, 2, 4, 2, DIM)
        wrapper = import_module("flashinfer.prefill").BatchPrefillWithPagedKVCacheWrapper
        self.wrapper = wrapper(torch.zeros(1 << 10, dtype=torch.uint8), "NHD", backend="fa2", **graph)

    def plan(self, starts=(0, 3, 4), indptr=(0, 2, 3), pages=(5, 2, 3), last=(3, 4), **options):
        tables = {"starts": starts, "indptr": indptr, "pages": pages, "last": last}
        tables = [one if isinstance(one, torch.Tensor) else int32(*one) for one in tables.values()]
        masking = {"causal": True, "q_data_type": torch.bfloat16, **options}
        self.wrapper.plan(*tables, 4, 2, DIM, 4, **masking)
        return self

    def run(self, q, **options):
        return self.wrapper.run(q, (self.cache[:, 0], self.cache[:, 1]), **options)

    def keys(self, *pages, length):
        return [self.cache[list(pages), side].flatten(0, 1)[:length] for side in (0, 1)]


@pytest.mark.parametrize("options", [{}, {"left": 2}, {"cap": 1.5}, {"left": 0, "cap": 3.0}])
def test_paged_flashinfer_is_what_its_reference_tests_say(options):
    asked = {"window_left": options.get("left", -1), "logits_soft_cap": options.get("cap")}
    paged, q = Paged().plan(**asked), some(4, 4, DIM, seed=1)

    out, lse = paged.run(q, return_lse=True)

    for rows, held, length in ((slice(3), (5, 2), 7), (slice(3, 4), (3,), 4)):
        expected, sums = written_out(q[rows], *paged.keys(*held, length=length), causal=True, **options)
        close(out[rows], expected)
        close(lse[rows], sums)


def test_a_window_of_flashinfer_counts_the_keys_before_a_row_s_own():
    # tests/attention/test_sliding_window.py: decoding with window_left w is decoding over the last w + 1 keys
    q = some(1, 4, DIM, seed=1)
    windowed = Paged().plan((0, 1), (0, 2), (5, 2), (3,), window_left=2)

    k, v = windowed.keys(5, 2, length=7)

    close(windowed.run(q), written_out(q, k[-3:], v[-3:], causal=True)[0])


def test_a_sequence_without_pages_is_zero_with_no_sum():
    # tests/attention/test_decode_prefill_lse.py
    paged, q = Paged().plan((0, 1, 3), (0, 0, 1), (3,), (0, 4)), some(3, 4, DIM)

    out, lse = paged.run(q, return_lse=True)

    assert not out[0].any()
    assert lse[0].isneginf().all()
    assert lse[1:].isfinite().all()


def test_rows_before_the_first_key_are_zero():
    # tests/attention/test_batch_prefill_kernels.py, "finite mask sentinel": more rows than keys
    paged, q = Paged().plan((0, 3), (0, 1), (3,), (1,)), some(3, 4, DIM)

    out, lse = paged.run(q, return_lse=True)

    assert not out[:2].any()
    assert lse[:2].isneginf().all()
    close(out[2:], written_out(q[2:], *paged.keys(3, length=1), causal=True)[0])


@pytest.mark.parametrize(("left", "causal"), [(None, False), (None, True), (2, True), (2, False)])
def test_ragged_flashinfer_has_windows_that_end_on_the_left_alone(left, causal):
    wrapper = import_module("flashinfer.prefill").BatchPrefillWithRaggedKVCacheWrapper
    wrapper = wrapper(torch.zeros(1 << 10, dtype=torch.uint8), "NHD", backend="fa2")
    starts, q, k, v = int32(0, 5, 6), some(6, 4, DIM), some(6, 2, DIM, seed=1), some(6, 2, DIM, seed=2)
    window = -1 if left is None else left
    wrapper.plan(starts, starts, 4, 2, DIM, causal=causal, window_left=window, q_data_type=torch.bfloat16)

    out, lse = wrapper.run(q, k, v, return_lse=True)

    for rows in (slice(5), slice(5, 6)):
        expected, sums = written_out(q[rows], k[rows], v[rows], causal=causal, left=left)
        close(out[rows], expected)
        close(lse[rows], sums)


MISUSES = {
    "int64 pages": ({"pages": torch.tensor([5, 2, 3])}, "pages is torch.int64"),
    "int64 starts": ({"starts": torch.tensor([0, 3, 4])}, "is torch.int64"),
    "a full page of 0": ({"last": (3, 0)}, "last_page_len at least 1"),
    "a page too few": ({"indptr": (0, 1, 3), "seq_lens": int32(7, 8)}, "pages of 4 for"),
    "starts that fall": ({"starts": (0, 3, 2)}, "never fall"),
    "a page outside": ({"pages": (5, 2, 9)}, "a page outside the cache"),
    "lengths of another step": ({"seq_lens": int32(7, 3)}, "sequence 1 has 3 keys, and 4"),
    "32-bit queries": ({"q_data_type": torch.float32}, "no kernels for queries in torch.float32"),
    "keys of another type": ({"kv_data_type": torch.float16}, "over keys in torch.float16"),
}


@pytest.mark.parametrize(("changes", "message"), MISUSES.values(), ids=MISUSES)
def test_what_flashinfer_would_read_as_rubbish_is_refused(changes, message):
    with pytest.raises(Misuse, match=message):
        Paged().plan(**changes).run(some(4, 4, DIM))


def test_an_8_bit_cache_is_refused_as_16_bit_by_flashinfer_itself():
    paged = Paged().plan(kv_data_type=torch.float8_e4m3fn)

    with pytest.raises((ValueError, Misuse)):
        paged.run(some(4, 4, DIM))


def test_a_workspace_that_is_not_zero_at_first_is_refused():
    wrapper = import_module("flashinfer.prefill").BatchPrefillWithRaggedKVCacheWrapper
    wrapper = wrapper(torch.ones(1 << 10, dtype=torch.uint8), "NHD", backend="fa2")

    with pytest.raises(Misuse, match="a workspace of zeros"):
        wrapper.plan(int32(0, 2), int32(0, 2), 4, 2, DIM, q_data_type=torch.bfloat16)


def test_a_graph_s_wrapper_refuses_another_number_of_sequences():
    sizes = {"qo_indptr": 3, "paged_kv_indptr": 3, "paged_kv_indices": 8, "paged_kv_last_page_len": 2}
    buffers = {f"{name}_buf": torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    paged = Paged(use_cuda_graph=True, **buffers).plan()

    with pytest.raises(ValueError, match="batch size should be fixed"):
        paged.plan((0, 1), (0, 1), (3,), (4,))


def packed(q, k, v, starts, ends, rows, keys, **options):
    return import_module("torch.nn.attention.varlen").varlen_attn(q, k, v, starts, ends, rows, keys, **options)


CACHE = some(3, 2, 256, 2, DIM)
TABLE, LENGTHS = int32([2, 0], [1, 2]), int32(256, 300)


@pytest.mark.parametrize("left", [-1, 0, 4])
def test_torch_s_varlen_reads_pages(left):
    q = some(5, 4, DIM, seed=1)
    paged = {"seqused_k": LENGTHS, "block_table": TABLE, "num_splits": 1, "enable_gqa": True}

    out = packed(
        q, CACHE[:, 0], CACHE[:, 1], int32(0, 2, 5), int32(0, 256, 556), 3, 300, window_size=(left, 0), **paged
    )

    for rows, held, length in ((slice(2), [2], 256), (slice(2, 5), [1, 2], 300)):
        own = [CACHE[held, side].flatten(0, 1)[:length] for side in (0, 1)]
        close(out[rows], written_out(q[rows], *own, causal=True, left=None if left < 0 else left)[0])


@pytest.mark.parametrize("side", [None, 0, 3])
def test_varlen_and_flash_attn_have_windows_of_two_sides(side):
    q, k, v = some(6, 2, DIM), some(6, 2, DIM, seed=1), some(6, 2, DIM, seed=2)
    starts, window = int32(0, 5, 6), (-1, -1) if side is None else (side, side)
    flash = import_module("flash_attn").flash_attn_varlen_func

    for out in (
        packed(q, k, v, starts, starts, 5, 5, window_size=window),
        flash(q, k, v, starts, starts, 5, 5, window_size=window),
    ):
        for rows in (slice(5), slice(5, 6)):
            expected, _ = written_out(q[rows], k[rows], v[rows], causal=False, left=side, right=side)
            close(out[rows], expected)


@pytest.mark.parametrize(("left", "cap"), [(-1, 0.0), (4, 0.0), (-1, 1.5)])
def test_flash_attn_reads_pages_in_both_of_its_functions(left, cap):
    package = import_module("flash_attn")
    q = some(2, 4, DIM, seed=1)
    masking = {"causal": True, "window_size": (left, 0), "softcap": cap, "block_table": TABLE}

    many = package.flash_attn_varlen_func(
        q, CACHE[:, 0], CACHE[:, 1], int32(0, 1, 2), int32(0, 256, 556), 1, 300, **masking
    )
    decoded = package.flash_attn_with_kvcache(
        q[:, None], CACHE[:, 0], CACHE[:, 1], cache_seqlens=LENGTHS, **masking
    ).squeeze(1)

    for i, (held, length) in enumerate((([2], 256), ([1, 2], 300))):
        own = [CACHE[held, side].flatten(0, 1)[:length] for side in (0, 1)]
        expected, _ = written_out(q[i : i + 1], *own, causal=True, left=None if left < 0 else left, cap=cap)
        close(many[i : i + 1], expected)
        close(decoded[i : i + 1], expected)


PAGED = {"seqused_k": LENGTHS, "block_table": TABLE, "num_splits": 1, "enable_gqa": True, "window_size": (-1, 0)}
VARLEN_MISUSES = {
    "automatic splits": ({"num_splits": None}, "num_splits must be 1"),
    "an int64 table": ({"block_table": TABLE.long()}, "block_table is torch.int64"),
    "int64 lengths": ({"seqused_k": LENGTHS.long()}, "seqused_k is torch.int64"),
    "a table of fewer rows": ({"block_table": TABLE[:1]}, "a table of 1 rows"),
    "more keys than a table's": ({"block_table": TABLE[:, :1]}, "1 pages of 256 for 300 keys"),
}


@pytest.mark.parametrize(("changes", "message"), VARLEN_MISUSES.values(), ids=VARLEN_MISUSES)
def test_what_varlen_would_read_as_rubbish_is_refused(changes, message):
    q, ends = some(2, 4, DIM), int32(0, 256, 556)

    with pytest.raises(Misuse, match=message):
        packed(q, CACHE[:, 0], CACHE[:, 1], int32(0, 1, 2), ends, 1, 300, **{**PAGED, **changes})


@pytest.mark.parametrize(
    ("most", "message"), [((1, 300), "more than max_q"), ((2, 299), "more than max_k")], ids=["rows", "keys"]
)
def test_a_bound_that_is_too_small_is_refused(most, message):
    q = some(3, 4, DIM)

    with pytest.raises(Misuse, match=message):
        packed(q, CACHE[:, 0], CACHE[:, 1], int32(0, 1, 3), int32(0, 256, 556), *most, **PAGED)


@pytest.mark.parametrize("cache", [CACHE[:, :, :128], CACHE.half()], ids=["pages of 128", "another dtype"])
def test_caches_that_the_kernels_cannot_read_are_refused(cache):
    q, ends = some(2, 4, DIM), int32(0, 256, 556)
    decode = import_module("flash_attn").flash_attn_with_kvcache

    with pytest.raises(Misuse):
        packed(q, cache[:, 0], cache[:, 1], int32(0, 1, 2), ends, 1, 300, **PAGED)
    with pytest.raises(Misuse):
        decode(q[:, None], cache[:, 0], cache[:, 1], cache_seqlens=LENGTHS, block_table=TABLE)


def test_a_private_name_that_is_gone_fails_loudly(monkeypatch):
    monkeypatch.delattr(import_module("flashinfer.prefill"), "get_batch_prefill_module")

    with pytest.raises(AttributeError, match="get_batch_prefill_module"), flashinfer_on_cpu():
        pass


@pytest.mark.parametrize("double", [flashinfer_module, flash_attn_module, varlen])
def test_a_double_of_another_version_is_not_used(double, monkeypatch):
    monkeypatch.setattr(double, "PINNED", "0.1")
    (name,) = (one for one in vars(double) if one.endswith("_on_cpu"))

    with pytest.raises(Misuse, match="its double knows 0"), getattr(double, name)():
        pass


def test_another_version_than_the_pinned_one_fails_loudly():
    with pytest.raises(Misuse, match=r"flashinfer-python is 0\.8, and its double knows 0\.7"):
        insist_version("flashinfer-python", "0.8", "0.7")
