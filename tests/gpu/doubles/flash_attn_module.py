"""The package flash-attn on a CPU: its Python is its own, only the compiled `flash_attn_2_cuda` is a double."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from importlib import import_module, metadata

import torch
from gpu.doubles.formula import attention
from gpu.doubles.launch import insist, insist_int32, insist_version, launch
from gpu.doubles.varlen import insist_flash, keys_of
from torch import Tensor

PINNED = "2.8.3.post2"


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    seqused_k: Tensor | None,
    leftpad: Tensor | None,
    table: Tensor | None,
    alibi: Tensor | None,
    most_rows: int,
    most_keys: int,
    dropout: float,
    scale: float,
    zero: bool,
    causal: bool,
    left: int,
    right: int,
    soft_cap: float,
    with_weights: bool,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences of any number of rows, over pages or over packed keys."""
    insist_flash(q, k, v, table)
    insist_int32(starts=starts, ends=ends, table=table)
    insist(len(starts) == len(ends), f"{len(starts)} starts and {len(ends)} ends")
    insist(table is None or len(table) == len(starts) - 1, "a table of another number of sequences")
    answer = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], len(q)), float("nan"))

    def run() -> None:
        for i in range(len(starts) - 1):
            rows, keys = (slice(int(at[i]), int(at[i + 1])) for at in (starts, ends))
            count, length = rows.stop - rows.start, keys.stop - keys.start
            insist(
                count <= most_rows and length <= most_keys, f"{count} rows, {length} keys: more than the stated most"
            )
            own = (one[keys] if table is None else keys_of(one, table[i], length) for one in (k, v))
            masking = {"causal": causal, "left": left, "right": right, "soft_cap": soft_cap}
            answer[rows], lse[:, rows] = attention(q[rows], *own, scale=scale, **masking)

    launch("flash_attn varlen_fwd", run)
    return answer, lse, torch.empty(0), torch.empty(0)


def fwd_kvcache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    new_k: Tensor | None,
    new_v: Tensor | None,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    batch_index: Tensor | None,
    leftpad: Tensor | None,
    table: Tensor | None,
    alibi: Tensor | None,
    out: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    soft_cap: float,
    interleaved: bool,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """As many rows of every sequence, over pages."""
    insist_flash(q, k, v, table)
    insist_int32(lengths=lengths, table=table)
    assert lengths is not None, "the double needs cache_seqlens"
    assert table is not None, "the double needs block_table"
    insist(
        len(lengths) == len(table) == len(q), f"{len(q)} sequences, {len(lengths)} lengths, {len(table)} rows of pages"
    )
    answer = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"))

    def run() -> None:
        for i, length in enumerate(lengths.tolist()):
            own = (keys_of(one, table[i], length) for one in (k, v))
            masking = {"causal": causal, "left": left, "right": right, "soft_cap": soft_cap}
            answer[i], lse[i] = attention(q[i], *own, scale=scale, **masking)

    launch("flash_attn fwd_kvcache", run)
    return answer, lse


@contextlib.contextmanager
def flash_attn_on_cpu() -> Iterator[None]:
    """Run flash-attn on CPU tensors. Raises Misuse for any version but the pinned one."""
    insist_version("flash-attn", metadata.version("flash-attn"), PINNED)
    compiled = types.ModuleType("flash_attn_2_cuda")
    compiled.varlen_fwd, compiled.fwd_kvcache = varlen_fwd, fwd_kvcache
    sys.modules["flash_attn_2_cuda"] = compiled
    interface = import_module("flash_attn.flash_attn_interface")
    # The package registers this operator for CUDA alone; a CPU gets the same body.
    operator = interface._flash_attn_varlen_forward
    operator.register_kernel("cpu")(operator._init_fn)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_2_cuda")]:
            # Without the double the package cannot be imported, as on a machine where it was never compiled.
            del sys.modules[name]
