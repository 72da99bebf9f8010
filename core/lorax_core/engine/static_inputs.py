"""The memory that captured steps read, and how the numbers of a step get there.

Decides where each input lies, which never changes, and what stands in rows that a step does not have. Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorax_core.attention.base import HostAndDevice
from lorax_core.engine.step_input import ChunkInput
from lorax_core.modeling.batch import Batch


class StaticInputs:
    """What all captured steps read. Smaller steps read the first rows of the same memory.

    Rows behind those of a step are padding: one key on the scratch page, which they write and read.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype, where: torch.device | str = device) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=where)

        # Token ids, positions, token types (0: sequences that generate have no others) and slots, which travel in one copy.
        self._rows = zeros(4, rows, dtype=torch.int64)
        self._lengths = zeros(rows, dtype=torch.int32)
        self._pages = zeros(rows, width, dtype=torch.int32)
        # Not pinned: the driver takes a copy of pageable memory before the call returns, so the next step may overwrite it.
        self._host_rows = zeros(4, rows, dtype=torch.int64, where="cpu")
        self._host_lengths = zeros(rows, dtype=torch.int32, where="cpu")
        self._host_pages = zeros(rows, width, dtype=torch.int32, where="cpu")
        starts = torch.arange(rows + 1, dtype=torch.int32)
        self._starts = HostAndDevice(starts, starts.to(device))
        self._filled = 0  # rows of the step before
        self._most = 0  # pages that its longest sequence had

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return sum(one.nbytes for one in (self._rows, self._lengths, self._pages, self._starts.device))

    def batch(self, rows: int) -> Batch:
        """The batch of the first `rows` rows, without attention and adapters."""
        ids, positions, types, slots = (one[:rows] for one in self._rows)
        return Batch(
            input_ids=ids,
            position_ids=positions,
            token_type_ids=types,
            query_starts=HostAndDevice(self._starts.host[: rows + 1], self._starts.device[: rows + 1]),
            kv_lengths=HostAndDevice(self._host_lengths[:rows], self._lengths[:rows]),
            page_table=HostAndDevice(self._host_pages[:rows], self._pages[:rows]),
            slots=slots,
        )

    def fill(self, chunks: Sequence[ChunkInput], page_size: int) -> None:
        """Bring the rows of a step, and padding behind them."""
        count, table = len(chunks), self._host_pages.numpy()
        rows, lengths = self._host_rows.numpy(), self._host_lengths.numpy()
        most = max((len(chunk.pages) for chunk in chunks), default=0)
        table[: max(count, self._filled), : max(most, self._most)] = 0
        for at, chunk in enumerate(chunks):
            table[at, : len(chunk.pages)] = np.frombuffer(chunk.pages, np.int32)
        positions = np.fromiter((chunk.start for chunk in chunks), np.int64, count)
        rows[:] = 0
        rows[0, :count] = [chunk.tokens[0] for chunk in chunks]
        rows[1, :count] = positions
        pages = table[np.arange(count), positions // page_size].astype(np.int64)
        rows[3, :count] = pages * page_size + positions % page_size
        lengths[:] = 1
        lengths[:count] = positions + 1
        # Also what the step before had beyond: the pages of others, which may hold NaN by now.
        self.upload(max(count, self._filled), max(most, self._most))
        self._filled, self._most = count, most

    def upload(self, rows: int, pages: int) -> None:
        """Copy everything to the device, of the page table the first `rows` rows and `pages` columns."""
        self._rows.copy_(self._host_rows, non_blocking=True)
        self._lengths.copy_(self._host_lengths, non_blocking=True)
        # The rest of the table is zero, here and there: it is as wide as the longest sequence that can come.
        self._pages[:rows, :pages].copy_(self._host_pages[:rows, :pages], non_blocking=True)
