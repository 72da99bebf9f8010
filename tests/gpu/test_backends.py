"""Each backend over the double of its compiled part, against the torch backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from gpu.doubles.backends import BACKENDS, backends_on_cpu
from gpu.steps import Step, graph_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from lorax_core.attention.base import AttentionSpec

PAGES = {"flashinfer": (16, 1, 5, 64), "flash_attn": (256, 512), "varlen": (256, 512)}
CAPPED = ("flashinfer", "flash_attn")


@pytest.fixture(scope="module", autouse=True)
def _on_cpu() -> Iterator[None]:
    with backends_on_cpu():
        yield


def spec(*, heads: int = 4, kv_heads: int = 2, dim: int = 64, causal: bool = True, **options: object) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, causal, **options)


STEPS = {
    "prompts": [(0, 5), (0, 1), (0, 18)],
    "chunks after cached tokens": [(6, 4), (13, 3), (16, 16)],
    "decode": [(3, 1), (17, 1), (8, 1), (15, 1), (16, 1), (31, 1)],
    "decode of one": [(7, 1)],
    "all kinds": [(0, 7), (5, 1), (9, 4), (20, 1), (0, 1), (15, 17)],
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("window", [None, 1, 5, 16])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_rows_attend_to_their_own_past(name, sizes, window, soft_cap):
    if soft_cap is not None and name not in CAPPED:
        soft_cap = None
    step = Step([spec(window=window, soft_cap=soft_cap)], sizes, page_size=PAGES[name][0])

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_steps_of_random_layers_are_those_of_the_torch_backend(name, data):
    draw = data.draw
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 3), (4, 1)]))
    dim = draw(st.sampled_from([64, 128] if name == "flashinfer" else [8, 40, 64]))
    caps = [None, 1.5] if name in CAPPED else [None]
    windows = st.one_of(st.none(), st.integers(1, 40))
    kinds = draw(st.lists(st.tuples(windows, st.sampled_from(caps)), min_size=1, max_size=3))
    specs = [
        spec(heads=kv_heads * group, kv_heads=kv_heads, dim=dim, window=window, soft_cap=cap) for window, cap in kinds
    ]
    sizes = draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 7, 20])), min_size=1, max_size=6))
    step = Step(
        specs,
        sizes,
        page_size=draw(st.sampled_from(PAGES[name])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        pages=400 if name == "flashinfer" else 8,
        seed=draw(st.integers(0, 99)),
    )

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_8_bit_cache_is_read_with_the_scales_of_each_layer(sizes, window, kv_dtype):
    one = spec(window=window)
    step = Step([one, one], sizes, kv_dtype=kv_dtype, scales=[(0.03, 0.02), (0.05, 0.07)])

    step.insist(step.by(BACKENDS["flashinfer"]()))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lengths", [(6,), (1, 9, 4), (1, 1), (300, 2)])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_an_encoder_row_attends_to_its_whole_text_and_to_no_other(name, lengths, window, heads):
    if name == "flashinfer":
        window = None
    step = Step([spec(heads=heads[0], kv_heads=heads[1], causal=False, window=window)], [(0, n) for n in lengths])

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("name", CAPPED)
def test_an_encoder_may_have_a_soft_cap(name):
    step = Step([spec(causal=False, soft_cap=1.5)], [(0, 5), (0, 8)])

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_one_projection_are_taken_as_they_come(name):
    # q, k and v of one product are slices of it, with gaps between their rows.
    step = Step([spec(causal=False, heads=2)], [(0, 5), (0, 8)])
    whole = torch.cat([*step.q, *step.k, *step.v], 1)
    step.q, step.k, step.v = ([part] for part in whole.split(2, 1))

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("name", BACKENDS)
def test_layers_of_several_kinds_are_planned_side_by_side(name):
    caps = [None, 3.0, None] if name in CAPPED else [None] * 3
    specs = [spec(window=window, soft_cap=cap) for window, cap in zip((None, 3, 17), caps, strict=True)]
    step = Step([*specs, specs[0]], STEPS["all kinds"], page_size=PAGES[name][0])

    step.insist(step.by(BACKENDS[name]()))


@pytest.mark.parametrize("name", BACKENDS)
def test_two_engines_in_one_process_keep_out_of_each_other_s_steps(name):
    one = Step([spec(window=4)], STEPS["all kinds"], page_size=PAGES[name][0], seed=1)
    two = Step([spec(window=4)], STEPS["decode"], page_size=PAGES[name][0], seed=2)
    first, second = (step.bound(BACKENDS[name](), step.pool(step.dtype)).plan(step.rows) for step in (one, two))

    one.insist(one.run(first))
    two.insist(two.run(second))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_plans_step_after_step(name):
    backend = BACKENDS[name]()
    for seed, sizes in enumerate([*STEPS.values()] * 2):
        step = Step([spec(), spec(window=5)], sizes, page_size=PAGES[name][0], seed=seed)

        step.insist(step.by(backend))


DECODES = [
    [(3, 1), (17, 1), (31, 1), (16, 1)],
    [(4, 1), (40, 1), (32, 1), (0, 1)],
    [(60, 1), (0, 1), (15, 1), (47, 1)],
]


def padded(step: Step, real: int) -> Step:
    """The same step, its last rows padding: one key on the scratch page."""
    for numbers in step.rows.kv_lengths:
        numbers[real:] = 1
    for table in step.rows.page_table:
        table[real:] = 0
    step.rows.slots[real:] = 0
    return step


@pytest.mark.parametrize("name", BACKENDS)
def test_a_graph_replays_other_steps_in_the_same_memory(name):
    size = PAGES[name][0]
    specs = [spec(), spec(window=5), spec(window=20)]
    first = Step(specs, DECODES[0], page_size=size, width=8)
    pool = first.pool(first.dtype)
    backend = first.bound(BACKENDS[name](), pool)
    rows = first.rows
    graph = graph_of(backend, first)
    # Two graphs of one engine stand side by side, and an eager step comes between.
    other = graph_of(backend, Step(specs, DECODES[1], page_size=size, width=8))

    for seed, sizes in enumerate([DECODES[0], *DECODES[1:], DECODES[0]]):
        step = padded(Step(specs, sizes, page_size=size, width=8, seed=seed), real=3)
        pool.data.copy_(step.pool(step.dtype).data)
        for ours, new in ((rows.query_starts, step.rows.query_starts), (rows.kv_lengths, step.rows.kv_lengths)):
            ours.device.copy_(new.device)
        rows.page_table.device.copy_(step.rows.page_table.device)
        rows.slots.copy_(step.rows.slots)
        graph.replan(step.rows)
        answers = step.run(graph)

        step.insist(answers, rows=slice(3))
        assert all(answer.isfinite().all() for answer in answers)
        backend.plan(Step(specs, STEPS["all kinds"], page_size=size).rows)
    assert other is not graph


@pytest.mark.parametrize("name", BACKENDS)
def test_a_graph_takes_sequences_that_fill_the_whole_table(name):
    size = PAGES[name][0]
    full = [(2 * size - 1, 1)] * 3
    step = Step([spec(), spec(window=5)], full, page_size=size, width=2)
    backend = step.bound(BACKENDS[name](), step.pool(step.dtype))
    graph = graph_of(backend, step)

    graph.replan(step.rows)

    step.insist(step.run(graph))


@pytest.mark.parametrize("name", BACKENDS)
def test_encoders_are_not_captured(name):
    step = Step([spec(causal=False)], [(0, 1), (0, 1)])
    backend = step.bound(BACKENDS[name](), None)

    assert backend.plan_graph(step.rows) == "bidirectional layers have no decoding steps"


def test_a_graph_that_has_no_room_for_its_worst_step_is_refused_with_the_reason():
    class Cramped(BACKENDS["flashinfer"]):
        def _plan_paged(self, *args):
            raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")

    step = Step([spec()], DECODES[0], width=4)
    backend = step.bound(Cramped(), step.pool(step.dtype))

    reason = backend.plan_graph(step.rows)

    assert reason.startswith("FlashInfer cannot plan 4 rows for a graph: Buffer overflow")


REFUSED = {
    "float32": ("flashinfer flash_attn varlen", spec(), {"dtype": torch.float32}, "not in torch.float32"),
    "heads of 80": ("flashinfer", spec(dim=80), {}, "heads of 64, 128, 256, not of 80"),
    "heads of 36": ("flash_attn varlen", spec(dim=36), {}, "a multiple of 8, at most 256, not of 36"),
    "heads of 512": ("flash_attn varlen flashinfer", spec(dim=512), {}, "not of 512"),
    "encoder windows": ("flashinfer", spec(causal=False, window=9), {}, "a window of 9 need both sides"),
    "unlike keys": ("flashinfer", spec(), {"kv_dtype": torch.float16}, "keys and values in torch.float16 under"),
    "8-bit keys": ("flash_attn varlen", spec(), {"kv_dtype": torch.float8_e4m3fn}, "not in torch.float8_e4m3fn"),
    "soft caps": ("varlen", spec(soft_cap=30.0), {}, "torch's FlashAttention has no soft cap"),
    "pages": ("flash_attn varlen", spec(), {"page_size": 16}, "pages of a multiple of 256 tokens, not of 16"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_a_backend_cannot_do_is_refused_with_the_reason(case):
    names, layer, changes, reason = case
    for name in names.split():
        wanted = {"dtype": torch.bfloat16, "device": "cpu", **changes}
        wanted.setdefault("kv_dtype", wanted["dtype"])

        assert reason in BACKENDS[name]().layout([spec(), layer], **wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_can_do_it_takes(name):
    backend = BACKENDS[name]()
    wanted = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, "device": "cpu"}

    layout = backend.layout([spec(), spec(window=8)], **wanted)

    assert (layout.page_size, layout.dtype) == (PAGES[name][0], torch.bfloat16)
    assert backend.layout([spec(causal=False)], **wanted, page_size=16).page_size == 16


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "reason"),
    [
        ("flashinfer", torch.bfloat16, (7, 5), "needs compute capability 8.0 for torch.bfloat16, and this GPU has 7.5"),
        ("flashinfer", torch.float16, (7, 0), "needs compute capability 7.5 for torch.float16, and this GPU has 7.0"),
        ("flashinfer", torch.float16, (7, 5), None),
        ("flash_attn", torch.float16, (7, 5), "needs compute capability 8.0, and this GPU has 7.5"),
        ("varlen", torch.bfloat16, (8, 0), None),
    ],
)
def test_an_old_gpu_is_refused(name, dtype, capability, reason):
    class Old(BACKENDS[name]):
        @staticmethod
        def capability(device):
            return capability

    layout = Old().layout([spec()], dtype=dtype, kv_dtype=dtype, device="cuda")

    assert (layout if isinstance(layout, str) else None) == reason


def test_fa3_has_no_kernel_for_an_8_bit_cache():
    class Hopper(BACKENDS["flashinfer"]):
        kernels = "fa3"

    wanted = {"dtype": torch.bfloat16, "device": "cpu"}

    assert "has no fa3 kernel" in Hopper().layout([spec()], kv_dtype=torch.float8_e4m3fn, **wanted)
    assert Hopper().layout([spec()], kv_dtype=torch.bfloat16, **wanted).page_size == 16


def test_pages_behind_the_window_are_not_looked_at():
    step = Step([spec(window=5)], [(40, 1), (36, 1)])
    for table in step.rows.page_table:
        table[:, :2] = 10**6  # no page at all; the double refuses it

    answers = step.by(BACKENDS["flashinfer"]())

    for table in step.rows.page_table:
        table[:, :2] = 0
    step.insist(answers)


def test_one_module_serves_prompts_and_decoding():
    from gpu.doubles.flashinfer_module import flashinfer_on_cpu

    with flashinfer_on_cpu() as modules:
        backend = BACKENDS["flashinfer"]()
        for sizes in STEPS.values():
            Step([spec()], sizes).by(backend)

        assert len(modules) == 1


def test_each_kind_of_layer_is_planned_once_a_step():
    from gpu.doubles.flashinfer_module import flashinfer_on_cpu

    with flashinfer_on_cpu() as modules:
        kinds = [spec(), spec(window=8), spec(window=9)]
        step = Step([*kinds, *kinds, replace(kinds[0])], STEPS["all kinds"])
        step.by(BACKENDS["flashinfer"]())

        assert sum(module.plans for module in modules.values()) == 3
        assert sum(module.runs for module in modules.values()) == 7


class Zeros(TorchFunctionMode):
    """Tells what is filled with zeros."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.zeros:
            self.shapes.append(tuple(made.shape))
        return made


def test_what_flashinfer_writes_is_not_filled_with_zeros_first():
    step = Step([spec()], STEPS["all kinds"])

    with Zeros() as filled:
        answers = step.by(BACKENDS["flashinfer"]())

    assert tuple(answers[0].shape) not in filled.shapes
    assert filled.shapes  # the workspace of its kernels is
    step.insist(answers)
