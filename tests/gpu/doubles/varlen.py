"""torch's `varlen_attn` on a CPU: its Python is torch's own, the operator below it (FlashAttention 2) is a double."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from gpu.doubles.formula import attention
from gpu.doubles.launch import insist, insist_int32, insist_version, launch
from torch import Tensor

PINNED = "2.13"


def insist_flash(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None) -> None:
    """What FlashAttention 2 insists on in either packaging (csrc/flash_attn/flash_api.cpp)."""
    insist(q.dtype in (torch.float16, torch.bfloat16), f"queries in {q.dtype}")
    insist(k.dtype is q.dtype and v.dtype is q.dtype, f"queries in {q.dtype} over keys in {k.dtype}")
    insist(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, f"heads of {q.shape[-1]}")
    insist(q.shape[-2] % k.shape[-2] == 0, f"{q.shape[-2]} query heads over {k.shape[-2]} key heads")
    insist(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension has gaps")
    if table is not None:
        insist(k.dim() == 4 and k.shape[1] % 256 == 0, f"pages {tuple(k.shape)}, not of a multiple of 256 tokens")


def keys_of(store: Tensor, table: Tensor, length: int) -> Tensor:
    """The first keys of one sequence: `[length, kv_heads, dim]`."""
    held = table[: -(-length // store.shape[1])].long()
    insist(len(held) * store.shape[1] >= length, f"{len(held)} pages of {store.shape[1]} for {length} keys")
    insist(((held >= 0) & (held < len(store))).all(), f"a page outside the cache: {held.tolist()}")
    return store[held].flatten(0, 1)[:length]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    insist_flash(query, key, value, block_table)
    insist_int32(cum_seq_q=cum_seq_q, cum_seq_k=cum_seq_k, seqused_k=seqused_k, block_table=block_table)
    seqs = len(cum_seq_q) - 1
    assert cum_seq_k is not None, "the double computes no queries over padded keys"
    insist(len(cum_seq_k) == seqs + 1, f"cum_seq_k has {len(cum_seq_k)} numbers for {seqs} sequences")
    if block_table is not None:
        assert seqused_k is not None, "a paged call needs seqused_k"
        insist(num_splits == 1, "over pages num_splits must be 1: rows are left unwritten otherwise (pytorch#194167)")
        insist(len(block_table) == len(seqused_k) == seqs, f"a table of {len(block_table)} rows for {seqs} sequences")
    left, right = (-1 if side is None or side >= max_k else side for side in (window_size_left, window_size_right))
    # NaN where nothing is written, as fresh memory of a GPU may hold.
    out = torch.full_like(query, float("nan"))
    lse = torch.full((query.shape[1], query.shape[0]), float("nan"))

    def run() -> None:
        insist(int(cum_seq_q[-1]) <= len(query), f"rows to {int(cum_seq_q[-1])} of {len(query)}")
        for i in range(seqs):
            rows = slice(int(cum_seq_q[i]), int(cum_seq_q[i + 1]))
            insist(
                rows.stop - rows.start <= max_q,
                f"{rows.stop - rows.start} rows, more than max_q: some are not computed",
            )
            if block_table is not None:
                length = int(seqused_k[i])
                insist(length <= max_k, f"{length} keys, more than max_k")
                k, v = (keys_of(store, block_table[i], length) for store in (key, value))
            else:
                k, v = (one[int(cum_seq_k[i]) : int(cum_seq_k[i + 1])] for one in (key, value))
            masking = {"causal": is_causal, "left": left, "right": right}
            size = query.shape[-1] ** -0.5 if scale is None else scale
            out[rows], lse[:, rows] = attention(query[rows], k, v, scale=size, **masking)

    launch("aten::_flash_attention_forward", run)
    nothing = torch.zeros(2, dtype=torch.uint64)
    return out, lse, nothing, nothing.clone(), torch.empty(0)


@contextlib.contextmanager
def varlen_on_cpu() -> Iterator[None]:
    """Run `varlen_attn` on CPU tensors. Raises Misuse for any torch but the pinned one."""
    insist_version("torch", ".".join(torch.__version__.split(".")[:2]), PINNED)
    library = torch.library.Library("aten", "IMPL")
    # The name of the operator is private; torch refuses one that it does not have.
    library.impl("_flash_attention_forward", _forward, "CPU")
    try:
        yield
    finally:
        library._destroy()
