"""Mistakes planted in the Triton kernels: each is found by the check that is meant for it."""

from __future__ import annotations

import importlib.util
import inspect
import sys

import pytest
import torch
from gpu import kernel_checks as held
from gpu import ptx
from gpu.doubles.sanitizer import OutOfBounds, Race
from gpu.doubles.triton_driver import device, pretend_gpu

from lorax_core.kernels import triton as package
from lorax_core.kernels.triton import elementwise, lora, rows


def check_wide_loads():
    """`ptx` of the aligned form has no loads of 2 bytes."""
    x, y = torch.zeros(1, 896, dtype=torch.bfloat16), torch.zeros(1, 1152, dtype=torch.bfloat16)
    made = compiled_lora(x, y)
    assert not [one for one in made if ptx._line(one, "", x.dtype).narrow], "loads of 2 bytes"


def check_no_tf32():
    """`ptx` in float32 has no TF32."""
    x, y = torch.zeros(1, 896), torch.zeros(1, 1152)
    assert not [one for one in compiled_lora(x, y) if "tf32" in one.asm["ptx"]], "TF32"


def compiled_lora(x, y):
    module = package.lora
    form = module.form(1)
    tiles = torch.zeros(1, module.TILE_FIELDS, dtype=torch.int64)
    launch = module.Launch(tiles, module.scratch(1, 16, form, torch.device("cpu")), 1, 16, form)
    with pretend_gpu(90, computes=False):
        launch.add(0, 16, x, y, aligned=True)
    caches = [kernel.device_caches[device(90)][0] for kernel in (module.shrink, module.expand)]
    return [list(cache.values())[-1] for cache in caches]


def check_no_compilation():
    """Nothing is compiled when a rank or a site's number changes."""
    with pretend_gpu(90) as gpu:
        kernel = held.TritonKernel(held.CPU)
        for seed, rank in enumerate((8, 8, 40, 100)):
            if seed == 1:
                gpu.compiled.clear()
            work = held.Work(torch.bfloat16, ((3 + 13 * seed, (rank, rank, rank)),))
            work.add(kernel.plan(work.segments))
            kernel.plan(work.segments).add("other", work.x, work.y)
    assert gpu.compiled == [], "compiled again"


WRONG = AssertionError  # numbers, or what was compiled; the sanitizer has errors of its own
# module, the line as it is, the mistake, the check that finds it, and how
MISTAKES = {
    "rows of x in 32 bits": (
        lora, "x + rows[:, None] * x_row", "x + rows.to(tl.int32)[:, None] * x_row", held.check_far_rows, WRONG),
    "rows of y in 32 bits": (
        lora, "y + rows[:, None] * y_row", "y + rows.to(tl.int32)[:, None] * y_row", held.check_far_rows, OutOfBounds),
    "rows of a norm in 32 bits": (
        rows, "v = tl.load(x + row * x_row", "v = tl.load(x + row.to(tl.int32) * x_row", held.check_far_rows, OutOfBounds),
    "slots in 32 bits": (
        rows, "at = to * KV_HEADS * DIM", "at = to.to(tl.int32) * KV_HEADS * DIM", held.check_far_slots, OutOfBounds),
    "rows past the tile": (
        lora, "mask=(m < count)[:, None] & (k < k_to)[None, :]", "mask=(m < 16)[:, None] & (k < k_to)[None, :]",
        held.check_lora, OutOfBounds),
    "columns past K": (
        lora, "(r < rank)[None, :] & (k < k_to)[:, None]", "(r < rank)[None, :] & (k < k_to + 64)[:, None]",
        held.check_lora, OutOfBounds),
    "ranks past the adapter's": (
        lora, "mask=(r < rank)[None, :] & (k < k_to)[:, None]", "mask=(r < rank + 1)[None, :] & (k < k_to)[:, None]",
        held.check_lora, OutOfBounds),
    "columns past the block": (
        lora, "inside = (n >= column) & (n < column + width)", "inside = (n >= column)", held.check_lora, WRONG),
    "columns past y": (
        lora, "mask = (m < count)[:, None] & (n < N)[None, :]", "mask = (m < count)[:, None] & (n < N + 1)[None, :]",
        held.check_lora, (OutOfBounds, Race)),
    "rows of two tiles": (
        lora, "count = tl.load(tile + 1).to(tl.int32)\n    n_from", "count = BLOCK_M\n    n_from", held.check_lora,
        (OutOfBounds, Race)),
    "the first split alone": (
        lora, "for split in tl.static_range(SPLIT_K)", "for split in tl.static_range(1)", held.check_lora_split,
        WRONG),
    "all splits in one plane": (
        lora, "plane = h + tl.program_id(2).to(tl.int64) * rows_in_all * h_row", "plane = h", held.check_lora_split, Race),
    "a split that is not written": (
        lora, "k_to = tl.minimum(k_from + share, K)", "k_to = tl.minimum(k_from + share - BLOCK_K, K)",
        held.check_lora_split, WRONG),
    "the first block's ranks for all": (
        lora, "(rank_from + r)[None, :]", "r[None, :]", held.check_lora, WRONG),
    "the first ranks alone": (
        lora, "for start in range(0, ranks, BLOCK_R)", "for start in range(0, 1, BLOCK_R)", held.check_lora, WRONG),
    "another adapter's table": (
        lora, "(tl.pointer_type(tl.int64)) + site * length\n    rank", "(tl.pointer_type(tl.int64))\n    rank", held.check_lora,
        WRONG),
    "y that is not added to": (
        lora, "(was.to(tl.float32) + sums).to", "sums.to", held.check_lora, WRONG),
    "sums in 16 bits": (
        lora, "(was.to(tl.float32) + sums).to(y.dtype.element_ty)",
        "(was.to(tl.float16) + sums.to(tl.float16)).to(y.dtype.element_ty)",
        lambda: held.check_lora(torch.float32), WRONG),
    "TF32": (
        lora, 'sums = tl.dot(xs, ws, sums, input_precision="ieee")', 'sums = tl.dot(xs, ws, sums, input_precision="tf32")',
        check_no_tf32, WRONG),
    "no word of alignment": (
        lora, "a = tl.multiple_of(a, 16)", "pass", check_wide_loads, WRONG),
    "alignment said of the number": (
        lora, "        b = tl.multiple_of(b, 16)", "        b = tl.multiple_of(address, 16).to(tl.pointer_type(dtype))",
        check_wide_loads, WRONG),
    "a rank that is compiled in": (
        lora, 'do_not_specialize=["site", "rows_in_all", "h_row"]', "do_not_specialize=[]", check_no_compilation, WRONG),
    "a norm of what was not rounded": (
        rows, "v = rounded.to(tl.float32)", "pass", held.check_norms, WRONG),
    "Llama's norm rounded once": (
        rows, "v.to(dtype).to(tl.float32) * w", "v * w", held.check_norms, WRONG),
    "Gemma's norm rounded twice": (
        rows, "v * (offset + w) if", "v.to(dtype).to(tl.float32) * (offset + w) if", held.check_norms, WRONG),
    "a mean over the block": (
        rows, "tl.sum(v * v, axis=0) / N", "tl.sum(v * v, axis=0) / BLOCK", held.check_norms, WRONG),
    "a mean that masked columns keep": (
        rows, "tl.where(mask, v - tl.sum(v, axis=0) / N, 0.0)", "v - tl.sum(v, axis=0) / N",
        lambda: held.check_norms(width=600), WRONG),
    "a norm past its row": (
        rows, "mask = n < N\n    dtype: tl.constexpr = x.dtype", "mask = n < N + 1\n    dtype: tl.constexpr = x.dtype",
        held.check_norms, (OutOfBounds, Race)),
    "rotation rounded once": (
        rows, "(first * c).to(dtype).to(tl.float32) - (second * s).to(dtype).to(tl.float32)", "first * c - second * s",
        held.check_rotation, WRONG),
    "rotation the other way": (
        rows, "(second * c).to(dtype).to(tl.float32) + (first", "(second * c).to(dtype).to(tl.float32) - (first",
        held.check_rotation, WRONG),
    "what does not rotate is forgotten": (
        rows, "if BLOCK_REST > 0:", "if False:", held.check_rotation, WRONG),
    "no slot is not skipped": (
        rows, "elif to >= 0:", "elif True:", held.check_no_slot, OutOfBounds),
    "values in the place of keys": (
        rows, "tl.store(v_out + at + numbers", "tl.store(k_out + at + numbers", held.check_rotation,
        (AssertionError, Race)),
    "a gate that is rounded once": (
        rows, "(gate.to(dtype).to(tl.float32) * up)", "(gate * up)", held.check_gate, WRONG),
    "the gate behind": (
        rows, "gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)\n    up = tl.load(at + N",
        "gate = tl.load(at + N, mask=mask, other=0.0).to(tl.float32)\n    up = tl.load(at", held.check_gate, WRONG),
    "a gate past its row": (
        rows, "mask = n < N\n    dtype: tl.constexpr = gate_up", "mask = n < N + 1\n    dtype: tl.constexpr = gate_up",
        lambda: held.check_gate(rows=1), OutOfBounds),
    "gelu for gelu by tanh": (
        rows, "elif ACT == 1:", "elif ACT >= 1:", lambda: held.check_gate(act="gelu_new"), WRONG),
}  # fmt: skip


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Puts a module with a changed line in the place of `lora` or `rows`."""

    def planted(module, line, mistake):
        source = inspect.getsource(module)
        assert line in source, f"the line is no longer there: {line!r}"
        file = tmp_path / f"{module.__name__.rpartition('.')[2]}.py"
        file.write_text(source.replace(line, mistake))
        spec = importlib.util.spec_from_file_location(f"planted_{file.stem}", file)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        if module is lora:
            monkeypatch.setattr(package, "lora", made)
        else:
            for name in ("normalise_rows", "gate_rows", "turn_rows"):
                monkeypatch.setattr(elementwise, name, getattr(made, name))

    return planted


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_by_the_check_that_is_meant_for_it(name, plant):
    module, line, mistake, check, found = MISTAKES[name]
    plant(module, line, mistake)

    with pretend_gpu(90), pytest.raises(found):
        check()


@pytest.mark.parametrize("check", sorted({str(m[3].__name__) for m in MISTAKES.values()} - {"<lambda>"}))
def test_the_checks_find_nothing_where_nothing_is_planted(check, plant):
    plant(lora, "BLOCK_R: Final = 16", "BLOCK_R: Final = 16")

    with pretend_gpu(90):
        (globals().get(check) or getattr(held, check))()
