from __future__ import annotations

import pytest
import torch
from builders import make_bert_model, make_lora, make_qwen2_model
from rigs import make_adapters, make_loaded

from lorax_core.engine.batcher import Batcher
from lorax_core.engine.plan import Chunk, StepPlan
from lorax_core.engine.sequence import Sequence
from lorax_core.engine.step_input import step_input
from lorax_core.engine.stopping import StopRule
from lorax_core.modeling.site import NoAdapters
from lorax_core.types import Task


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


def make_chunk(tokens, start=0, *, pages=(), adapter=None, task=Task.GENERATE, span=None):
    stop = StopRule(max_tokens=9) if task is Task.GENERATE else None
    sequence = Sequence(task=task, prompt=tokens, adapter=adapter, stop=stop, span=span, pages=list(pages))
    return Chunk(sequence, start, len(tokens) - start)


def packed(base, *chunks, page_size=4, adapters=None):
    return Batcher(base.model, page_size, adapters or {}).pack(step_input(StepPlan(chunks)))


def test_tokens_are_packed_end_to_end_with_their_positions_and_slots(base):
    first, second = make_chunk([5, 6, 7, 8, 9, 10], 3, pages=(2, 7)), make_chunk([20, 21], pages=(4,))

    batch = packed(base, first, second)

    assert batch.input_ids.tolist() == [8, 9, 10, 20, 21]
    assert batch.position_ids.tolist() == [3, 4, 5, 0, 1]
    assert batch.slots.tolist() == [2 * 4 + 3, 7 * 4, 7 * 4 + 1, 4 * 4, 4 * 4 + 1]
    assert batch.lengths == (3, 2)
    assert batch.query_starts.host.tolist() == [0, 3, 5]
    assert batch.kv_lengths.host.tolist() == [6, 2]
    assert batch.page_table.host.tolist() == [[2, 7], [4, 0]]
    for numbers in (batch.query_starts, batch.kv_lengths, batch.page_table):
        assert numbers.host.dtype is torch.int32
        assert torch.equal(numbers.host, numbers.device)


def test_a_row_of_the_page_table_keeps_nothing_of_the_step_before(base):
    batcher = Batcher(base.model, 4, {})
    long, short = make_chunk([5] * 6, pages=(2, 7)), make_chunk([20], pages=(4,))

    batcher.pack(step_input(StepPlan((long,))))
    batch = batcher.pack(step_input(StepPlan((short, long))))

    assert batch.page_table.host.tolist() == [[4, 0], [2, 7]]


def test_buffers_grow_with_the_step_and_are_kept(base):
    batcher = Batcher(base.model, 4, {})
    many = [make_chunk([at], pages=(at,) * 70) for at in range(1, 90)]

    batch = batcher.pack(step_input(StepPlan(tuple(many))))
    where = batch.page_table.host.data_ptr(), batch.query_starts.host.data_ptr()
    again = batcher.pack(step_input(StepPlan(tuple(many[:3]))))

    assert batch.page_table.host.shape == (89, 70)
    assert (again.page_table.host.data_ptr(), again.query_starts.host.data_ptr()) == where
    assert again.page_table.host.tolist() == [[at] * 70 for at in range(1, 4)]


def test_a_generating_head_reads_the_newest_row_of_each_finished_prompt(base):
    whole, part = make_chunk([5, 6, 7], pages=(1,)), make_chunk([8] * 6, pages=(2, 3))
    part = Chunk(part.sequence, 0, 4)

    [rows] = packed(base, part, whole).head_rows

    assert rows.task is Task.GENERATE
    assert rows.sequences == (1,)
    assert rows.rows.tolist() == [6]


def test_rows_of_several_tasks_are_told_apart(base):
    text = make_chunk([1, 2, 3], pages=(1,), task=Task.EMBED, span=range(1, 3))
    prompt = make_chunk([4, 5], pages=(2,))

    groups = {rows.task: rows for rows in packed(base, text, prompt).head_rows}

    assert groups[Task.EMBED].rows.tolist() == [1, 2]
    assert groups[Task.EMBED].counts == (2,)
    assert groups[Task.GENERATE].rows.tolist() == [4]


def test_rows_of_one_adapter_lie_side_by_side(base, tmp_path):
    folders = {name: make_lora(make_qwen2_model(), tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    store = make_adapters(base, **folders)
    named = ["a", None, "b", "a", None, "b"]
    chunks = [
        make_chunk([at, at], pages=(at + 1,), adapter=store.get(name) if name else None)
        for at, name in enumerate(named)
    ]

    batch = packed(base, *chunks, adapters=store.bound)

    runs = batch.adapters.runs
    assert [(one.stop - one.start) for one in runs] == [4, 4]
    assert {one.bound for one in runs} == {store.bound[store.get(name).identity] for name in "ab"}
    assert batch.input_ids.tolist()[:4] == [1, 1, 4, 4]  # the base comes first
    assert [one.stop - one.start for one in batch.head_rows[0].adapters.runs] == [2, 2]


def test_pooled_rows_are_of_the_adapters_of_their_sequences(base, tmp_path):
    folders = {name: make_lora(make_qwen2_model(), tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    store = make_adapters(base, **folders)
    chunks = [
        make_chunk([1] * 3, pages=(at,), adapter=store.get(name) if name else None, task=Task.EMBED, span=range(3))
        for at, name in enumerate(["a", None, "b", "b"], start=1)
    ]

    [rows] = packed(base, *chunks, adapters=store.bound).head_rows

    pooled = rows.pooled()
    assert pooled.counts == (1, 1, 1, 1)
    assert len(pooled.adapters.runs) == 2
    assert [(3 * run.start, 3 * run.stop, run.bound) for run in pooled.adapters.runs] == [
        (run.start, run.stop, run.bound) for run in rows.adapters.runs
    ]
    assert pooled.pooled() is pooled


def test_an_encoders_batch_has_token_types_and_no_cache(bert, host):
    encoder = make_loaded(bert, host)
    chunk = make_chunk([1, 2, 3], task=Task.EMBED, span=range(1))
    chunk.sequence.token_types = [0, 1, 1]

    batch = packed(encoder, chunk, make_chunk([4], task=Task.EMBED, span=range(1)), page_size=None)

    assert batch.token_type_ids.tolist() == [0, 1, 1, 0]
    assert batch.page_table is None
    assert batch.slots is None
    assert isinstance(batch.adapters, NoAdapters)
    assert make_bert_model().config.type_vocab_size == 2
