"""Decoding steps through captured graphs, on the tape that stands for a CUDA graph: the numbers of eager steps, always."""

from __future__ import annotations

import gc
import weakref
from array import array

import pytest
import torch
from builders import make_lora, make_qwen2_model
from captured import CapturableBackend, CapturableKernel, CapturedAttention, CapturedLora
from faulty_graphs import SetsOnce
from gpu.doubles.tape import Tape
from oracles import make_model, saved
from replays import COUNTS, ROWS, Rig, drive, make_chunk
from rigs import PAGE, finish, make_adapters, make_capturable, make_pool, make_sequence
from transformers import GPT2Config, GPT2LMHeadModel

from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.graphs import DecodeGraphs, sizes, why_eager
from lorax_core.engine.loop import EngineLoop
from lorax_core.engine.runner import Runner
from lorax_core.engine.scheduler import Scheduler
from lorax_core.engine.static_inputs import StaticInputs
from lorax_core.engine.step_input import HeadRead, StepInput
from lorax_core.kvcache.allocator import PageAllocator
from lorax_core.types import Task

WINDOWED = {"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 1}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
TARGETS = {"full": ["q_proj", "v_proj", "down_proj"], "windowed": "all-linear", "gpt2": ["c_attn", "c_fc"]}


def theirs(kind):
    if kind == "gpt2":
        return make_model(GPT2LMHeadModel, GPT2Config(**GPT2).to_diff_dict(), seed=2)
    return make_qwen2_model(seed=2, max_position_embeddings=160, **(WINDOWED if kind == "windowed" else {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints by kind of model, and adapters of three ranks for each."""
    made = {}
    for kind in TARGETS:
        model = theirs(kind)
        folder = saved(model, tmp_path_factory.mktemp(kind))
        ranks = (4, 16, 5)
        lora = [
            make_lora(
                model,
                tmp_path_factory.mktemp("lora"),
                rank,
                r=rank,
                lora_alpha=16,
                target_modules=TARGETS[kind],
                fan_in_fan_out=kind == "gpt2",  # its layers store their weights transposed
            )
            for rank in ranks
        ]
        made[kind] = folder, lora
    return made


@pytest.mark.parametrize("kind", TARGETS)
def test_replays_give_the_numbers_of_eager_steps(kind, folders, host):
    folder, lora = folders[kind]
    rig = Rig(make_capturable(folder, host))

    assert drive(rig, lora) < 1e-5
    assert len(rig.tapes) == 2 * len(sizes(ROWS))  # captured once, whatever adapters came
    assert sum(tape.replays for tape in rig.tapes) == len(COUNTS)


def test_a_captured_step_reads_what_an_eager_one_reads(folders, host):
    rig = Rig(make_capturable(folders["full"][0], host))
    inputs = StaticInputs(ROWS, 10, torch.device("cpu"))
    inputs.fill(rig.chunks(ROWS), PAGE)  # an older step of more rows
    chunks = rig.chunks(3)

    inputs.fill(chunks, PAGE)

    found, expected = inputs.batch(3), rig.batcher.pack(StepInput(chunks))
    for name in ("input_ids", "position_ids", "token_type_ids", "slots"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
    for name in ("query_starts", "kv_lengths", "page_table"):
        for memory in ("host", "device"):
            static, packed = (getattr(getattr(one, name), memory) for one in (found, expected))
            assert static[..., : packed.shape[-1]].tolist() == packed.tolist(), name
            assert not static[..., packed.shape[-1] :].any(), name
    assert not inputs.batch(ROWS).slots[3:].any()  # padding has the scratch page


def test_a_capture_touches_no_page_but_the_scratch_page(folders, host):
    rig = Rig(make_capturable(folders["windowed"][0], host))
    before = rig.pool.data[:, :, 1:].clone()

    assert rig.graphs.prepare(adapted=False) is None
    assert rig.graphs.prepare(adapted=True) is None

    assert torch.equal(rig.pool.data[:, :, 1:], before)


def test_the_memory_of_graphs_is_bounded_and_counted(folders, host):
    rig = Rig(make_capturable(folders["full"][0], host))

    rig.graphs.prepare(adapted=False)

    width = 160 // PAGE
    rows = ROWS * (4 * 8 + 4 + 4 * width) + 4 * (ROWS + 1)
    assert rig.graphs.nbytes == rows + ROWS * rig.base.model.config.vocab_size * 4


def test_pages_of_an_older_step_are_not_looked_at_again(folders, host):
    rig = Rig(make_capturable(folders["full"][0], host))
    long, short = rig.sequences[3], rig.sequences[2]
    rig.sequences = {3: (40, long[1])}
    rig.step(1)
    for pool in (rig.pool, rig.twin):  # its pages are another's by now, whose numbers are NaN
        pool.data[:, :, long[1]] = float("nan")
    rig.sequences = {2: short}
    chunks = rig.chunks(1, (None,))

    logits = rig.graphs.run(chunks, [], lambda ids: None)

    assert torch.isfinite(logits).all()


def make_graph_loop(base, store, make=Tape, rows=4):
    pool = make_pool(base, 32)
    backend, kernel = CapturableBackend(), CapturableKernel(rank=8)
    graphs = DecodeGraphs(base.model, backend, pool, kernel, rows, make)
    runner = Runner(base.model, backend, pool, store.bound, kernel, graphs)
    scheduler = Scheduler(max_tokens=64, max_rows=rows + 1, allocator=PageAllocator(33, PAGE))
    return EngineLoop(scheduler, runner)


def test_steps_are_counted_by_how_they_were_computed(folders, host):
    folder, lora = folders["full"]
    base = make_capturable(folder, host)
    store = make_adapters(base, small=lora[0], large=lora[1])
    loop = make_graph_loop(base, store)

    finish(loop, make_sequence([1, 2, 3], 4), make_sequence([4, 5], 4, adapter=store.get("small")))
    finish(loop, make_sequence([4, 5], 3, adapter=store.get("large")))
    finish(loop, *(make_sequence([at, 5], 2) for at in range(5)))

    assert loop.totals.graphs == {
        "prompt tokens": 3,
        "replayed": 3,
        "an adapter of a rank above 8": 2,
        "more rows than were captured": 1,
    }
    assert loop.last_step.graph == "more rows than were captured"


def test_an_adapter_that_was_unloaded_is_freed_though_no_step_is_eager(folders, host):
    folder, lora = folders["full"]
    base = make_capturable(folder, host)
    store = make_adapters(base, one=lora[0])
    loop = make_graph_loop(base, store)
    staying, adapted = make_sequence([1, 2, 3], 30), make_sequence([4, 5], 1, adapter=store.get("one"))
    loop.add(staying)
    loop.add(adapted)
    loop.step()  # eager, and the last for the adapter
    bound = weakref.ref(store.bound[adapted.adapter.identity])
    adapted.adapter = None
    store.unload("one")

    for _ in range(2):
        loop.step()
    gc.collect()

    assert loop.last_step.graph == "replayed"
    assert bound() is None


def test_warming_up_captures_every_size(folders, host):
    base = make_capturable(folders["full"][0], host)
    made = []

    def make():
        made.append(Tape())
        return made[-1]

    loop = make_graph_loop(base, make_adapters(base), make)

    loop.warmup(64)
    assert len(made) == len(sizes(4))
    finish(loop, make_sequence([1, 2, 3], 4))

    assert len(made) == len(sizes(4))
    assert loop.totals.graphs["replayed"] == 3


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20])])
def test_sizes_double_up_to_the_most_rows(most, expected):
    assert sizes(most) == expected


# --- planted mistakes ---


def forgetting(name):
    """Graphs one of whose inputs is not copied after the capture."""

    class Forgets(StaticInputs):
        def upload(self, rows, pages):
            batch = self.batch(ROWS)
            tensor = getattr(batch, name)
            memory = tensor if isinstance(tensor, torch.Tensor) else tensor.device
            before = memory.clone()
            super().upload(rows, pages)
            memory.copy_(before)

    return type("Forgetful", (DecodeGraphs,), {"inputs": Forgets})


class KeepsSlots(StaticInputs):
    """Padding rows keep the slots of the step before, which belong to sequences."""

    def upload(self, rows, pages):
        slots, before = self._host_rows[3], self._rows[3].clone()
        slots.copy_(torch.where(slots == 0, before, slots))
        super().upload(rows, pages)


class KeepsSlotsGraphs(DecodeGraphs):
    inputs = KeepsSlots


class SkipsAWindow(CapturedAttention):
    def replan(self, rows):
        self.replans += 1
        for window in list(self.masks)[: 1 if self.replans > 1 else None]:
            self.replan_window(window, rows)


class BakesALength(CapturedAttention):
    """Looks at as many keys as the captured step had."""

    def replan(self, rows):
        super().replan(rows)
        self.most = int(rows.kv_lengths.host.max())

    def attend(self, layer, q):
        self.masks[layer.spec.window][..., self.most :].zero_()
        return super().attend(layer, q)


class MakesTablesAnew(CapturedAttention):
    def replan_window(self, window, rows):
        self.masks[window] = self.masks[window].clone()
        super().replan_window(window, rows)


class CopiesTablesAnew(CapturedLora):
    def set(self, segments):
        self.a = {path: table.clone() for path, table in self.a.items()}
        super().set(segments)


def with_attention(kind):
    return {"backend": type("Faulty", (CapturableBackend,), {"attention": kind})}


def with_lora(kind):
    return {"kernel": type("Faulty", (CapturableKernel,), {"lora": kind})}


MISTAKES = {
    "token ids not copied": {"graphs": forgetting("input_ids")},
    "positions not copied": {"graphs": forgetting("position_ids")},
    "slots not copied": {"graphs": forgetting("slots")},
    "page table not copied": {"graphs": forgetting("page_table")},
    "padding rows keep their slots": {"graphs": KeepsSlotsGraphs},
    "a window is not planned again": with_attention(SkipsAWindow),
    "a length is baked in": with_attention(BakesALength),
    "tables are made again for attention": with_attention(MakesTablesAnew),
    "adapters are set once": with_lora(SetsOnce),
    "tables are made again for adapters": with_lora(CopiesTablesAnew),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_what_a_replay_reads_shows(mistake, folders, host):
    folder, lora = folders["windowed"]
    rig = Rig(make_capturable(folder, host), **MISTAKES[mistake])

    assert drive(rig, lora) > 1e-3


class ReadsBack(CapturedAttention):
    def attend(self, layer, q):
        self.rows.kv_lengths.device.max().item()
        return super().attend(layer, q)


class MakesOfHostValues(CapturedAttention):
    def attend(self, layer, q):
        return super().attend(layer, q) * torch.tensor([1.0])


class IndexesByMask(CapturedAttention):
    def attend(self, layer, q):
        q[self.rows.kv_lengths.device > 0]
        return super().attend(layer, q)


@pytest.mark.parametrize("kind", [ReadsBack, MakesOfHostValues, IndexesByMask])
def test_what_a_gpu_cannot_capture_is_refused_and_decoding_stays_eager(kind, folders, host, caplog):
    rig = Rig(make_capturable(folders["full"][0], host), **with_attention(kind))
    chunks = rig.chunks(2, (None,))

    reasons = [rig.graphs.run(chunks, [], lambda ids: None) for _ in range(2)]

    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("the capture failed: CannotCapture")
    assert len(caplog.records) == 1


# --- what no graph takes ---


def test_steps_that_are_not_decoding_alone_are_eager():
    plain = make_chunk(0, 1, 5, [1])
    others = {
        "prompt tokens": [
            {"tokens": array("q", [1, 2])},
            {"sampled": ()},
            {"reads": (), "sampled": ()},
            {"scored": array("q", [4])},
        ],
        "draft tokens": [{"tokens": array("q", [1, 2]), "drafts": 1}],
        "another head": [
            {"task": Task.EMBED, "reads": (HeadRead(Task.EMBED, range(1)),), "sampled": ()},
            {"own_head": True},
        ],
        "an adapter that drafts": [{"reads": (HeadRead(Task.GENERATE, range(1), speculates=True),)}],
    }

    assert why_eager([plain]) is None
    for reason, found in others.items():
        for changes in found:
            assert why_eager([plain, make_chunk(1, 1, 5, [1], **changes)]) == reason


def test_what_does_not_fit_a_graph_is_eager_with_the_reason(folders, host):
    rig = Rig(make_capturable(folders["full"][0], host), kernel=lambda: CapturableKernel(rank=8))
    adapter = rig.store.load("large", folders["full"][1][1])
    many = [make_chunk(at, 1, 1, [1]) for at in range(ROWS + 1)]
    of_adapter = [make_chunk(0, 1, 1, [1], adapter.identity)]

    assert rig.graphs.run(many, [], lambda ids: None) == "more rows than were captured"
    found = rig.graphs.run(of_adapter, rig.batcher.segments(of_adapter), lambda ids: None)
    assert found == "an adapter of a rank above 8"


def test_a_sequence_of_all_tokens_that_the_model_allows_is_replayed(folders, host):
    rig = Rig(make_capturable(folders["full"][0], host))
    pages = list(range(1, 160 // PAGE + 1))
    longest = [make_chunk(0, 1, 159, pages)]
    longer = [make_chunk(0, 1, 159, [*pages, 11])]

    assert isinstance(rig.graphs.run(longest, [], lambda ids: None), torch.Tensor)
    assert rig.graphs.run(longer, [], lambda ids: None) == "more pages than were captured"


def test_a_backend_or_kernel_without_graphs_gives_its_reason(folders, host):
    chunks = [make_chunk(0, 1, 1, [1])]
    backend = Rig(make_capturable(folders["full"][0], host), backend=TorchBackend)
    kernel = Rig(make_capturable(folders["full"][0], host), kernel=lambda: None)
    adapter = kernel.store.load("one", folders["full"][1][0])
    of_adapter = [make_chunk(0, 1, 1, [1], adapter.identity)]

    assert backend.graphs.run(chunks, [], lambda ids: None) == "the backend 'torch' cannot be captured"
    assert isinstance(kernel.graphs.run(chunks, [], lambda ids: None), torch.Tensor)
    found = kernel.graphs.run(of_adapter, kernel.batcher.segments(of_adapter), lambda ids: None)
    assert found == "no LoRA kernel that can be captured"
