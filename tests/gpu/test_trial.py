"""What trials find, and that neither a crash nor a hang gets past them."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace as changed

import pytest
import torch
from rigs import within

from lorax_core.serving.trial.child import run_trial
from lorax_core.serving.trial.compare import off
from lorax_core.serving.trial.run import Trials, machine
from lorax_core.serving.trial.spec import TRIAL, AttentionTrial, ElementwiseTrial, GraphTrial, LayerKind, LoraTrial
from lorax_core.settings import Settings

PLAIN = LayerKind(heads=4, kv_heads=2, head_dim=16, causal=True)
WINDOWED = PLAIN.model_copy(update={"window": 20})
CAPPED = PLAIN.model_copy(update={"soft_cap": 1.0})
BOTH_WAYS = LayerKind(heads=4, kv_heads=4, head_dim=16, causal=False)
LAYERS = (PLAIN, WINDOWED, CAPPED)
TORCH = "lorax_core.attention.torch:TorchBackend"
NATIVE = "lorax_core.attention.native:NativeBackend"
CAPTURABLE = "captured:CapturableBackend"
READABLE = "lorax_core.kernels.elementwise:Elementwise"
MACHINE = {"gpu": "none"}


def attention(backend, layers=LAYERS, **changes):
    path = backend if ":" in backend else f"faulty_kernels:{backend}"
    trial = {"device": "cpu", "dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 16, **changes}
    return AttentionTrial(backend=path, layers=layers, **trial)


def lora(kernel, dtype="bfloat16"):
    return LoraTrial(device="cpu", dtype=dtype, kernel=f"faulty_kernels:{kernel}", sizes=((48, 96), (64, 1)))


def elementwise(form, dtype="bfloat16"):
    path = form if ":" in form else f"faulty_elementwise:{form}"
    return ElementwiseTrial(
        device="cpu",
        dtype=dtype,
        form=path,
        widths=(48, 100),
        gates=(112,),
        layers=(PLAIN, BOTH_WAYS),
        turned=(0, 6, 16),
    )


def graphs(backend, layers=(PLAIN, WINDOWED), kernel=None, **changes):
    path = backend if ":" in backend else f"faulty_graphs:{backend}"
    kernel = kernel and f"faulty_graphs:{kernel}"
    trial = {"device": "cpu", "dtype": "float32", "kv_dtype": "float32", "page_size": 16, **changes}
    return GraphTrial(backend=path, layers=layers, kernel=kernel, graph="faulty_graphs:again", **trial)


RIGHT = {
    "attention": attention(TORCH),
    "attention in float32": attention(TORCH, dtype="float32", kv_dtype="float32"),
    "attention over 8 bits": attention(TORCH, kv_dtype="float8_e4m3fn"),
    "attention over large pages": attention(TORCH, page_size=256),
    "compiled attention, large scores": attention(
        NATIVE,
        (LayerKind(heads=16, kv_heads=8, head_dim=256, causal=True, soft_cap=50.0),),
        dtype="float32",
        kv_dtype="float32",
    ),
    "encoders": attention(TORCH, (BOTH_WAYS, BOTH_WAYS.model_copy(update={"window": 9}))),
    "LoRA": lora("load_torch"),
    "LoRA in float32": lora("load_torch", "float32"),
    "elementwise": elementwise(READABLE),
    "elementwise in float32": elementwise(READABLE, "float32"),
    "graphs": graphs(CAPTURABLE),
    "graphs in 16 bit": graphs(CAPTURABLE, dtype="bfloat16", kv_dtype="bfloat16"),
    "graphs over 8 bits": graphs(CAPTURABLE, (PLAIN,), kv_dtype="float8_e4m3fn"),
    "graphs with adapters": graphs(CAPTURABLE, kernel="load_capturable"),
}
EIGHT_BITS = {"kv_dtype": "float8_e4m3fn"}
WRONG = {
    "window": (attention("WindowOffByOne"), "window 20: off by"),
    "the edge of a window": (attention("EdgeOfWindow"), "decoding, 4 heads over 2 of 16, window 20: off by"),
    "cap": (attention("CapForgotten"), "cap 1: off by"),
    "pages in a row": (attention("PagesInARow"), "off by"),
    "the first layer for all": (attention("LayerZero", (PLAIN,)), "off by"),
    "the last layer for all": (attention("LastLayer", (PLAIN,)), "off by"),
    "one layer for all of a kind": (attention("OneLayerAKind"), "off by"),
    "a head that turns in part": (attention("PartNotTurned", (PLAIN,)), "off by"),
    "a head that does not turn": (attention("AnglesOfAnotherLayer", (PLAIN,)), "off by"),
    "rows past a tile": (attention("RowsPastATile"), "prompts"),
    "rows of a long chunk": (attention("RowsOfLongChunks"), "a long prompt"),
    "sequences past the tenth": (attention("SequencesPastTen"), "decoding of many"),
    "every sixteenth row": (attention("EverySixteenthRow"), "off by"),
    "splits": (attention("LostSplits"), "decoding over many keys"),
    "keys past five thousand": (attention("KeysPastFiveThousand"), "decoding over many keys"),
    "a chunk over many keys": (attention("ChunksOverManyKeys"), "a prompt over many keys"),
    "scale": (attention("ScaleForgotten", **EIGHT_BITS), "off by"),
    "a scale of the other": (attention("ScaleOfTheOther", **EIGHT_BITS), "off by"),
    "a scale of another layer": (attention("ScaleOfAnotherLayer", (PLAIN,), **EIGHT_BITS), "off by"),
    "NaN": (attention("GivesNaN"), "not finite"),
    "an error": (attention("Raises"), "RuntimeError: nvcc: no such architecture"),
    "a refusal": (attention("Refuses"), "refuses the model: not today"),
    "rows of a segment": (lora("load_rows_unwritten"), "48 to 96, few rows: off by"),
    "every sixteenth row of adapters": (lora("load_some_rows_off"), "48 to 96, few rows: off by"),
    "large ranks": (lora("load_ranks_cut"), "48 to 96, few rows: off by"),
    "larger ranks": (lora("load_large_ranks_cut"), "48 to 96, many rows: off by"),
    "many rows": (lora("load_many_rows_unwritten"), "48 to 96, many rows: off by"),
    "the row behind an adapter's": (lora("load_row_behind_the_last"), "48 to 96, few rows: off by"),
    "many adapters": (lora("load_adapters_cut"), "48 to 96, many adapters: off by"),
    "no kernel": (lora("load_none"), "nobody is at home"),
    "an offset": (elementwise("OffsetForgotten"), "rms_norm with an offset of 1 rows of 48"),
    "an offset after a sum": (elementwise("SumsOffsetForgotten"), "add_rms_norm with an offset of 1 rows of 48"),
    "no bias": (elementwise("BiasNeeded"), "layer_norm without a bias of 1 rows of 48"),
    "gate and up": (elementwise("GateAndUpExchanged"), "gated silu"),
    "a wide gate": (elementwise("GateCut"), "gated silu of 1 rows of 112"),
    "a row of the cache": (elementwise("LastRowNotStored"), "stored keys"),
    "what does not turn": (elementwise("RestForgotten"), "6 of them turned"),
    "keys that are not stored": (elementwise("KeysNotTurned"), "turned keys"),
    "keys that do not turn": (elementwise("StoredOnlyTurned"), "stored keys"),
    "a replay's lengths": (graphs("NotReplanned"), "step "),
    "a replay's rows past the eighth": (graphs("RowsPastEight"), "step 0 of 40 rows"),
    "a replay's layers": (graphs("LayerZero", (PLAIN,)), "step 0 of 40 rows"),
    "a replay's keys": (graphs("NotStored"), "step 0 of 40 rows"),
    "a replay's rows of an adapter": (graphs(CAPTURABLE, kernel="load_first_row_alone"), "step 0 of 40 rows"),
    "a replay's ranks": (graphs(CAPTURABLE, kernel="load_ranks_at_once"), "step 0 of 40 rows"),
    "a replay's second layer": (graphs(CAPTURABLE, kernel="load_first_site_alone"), "step 0 of 40 rows"),
    "a replay's row without an adapter": (graphs(CAPTURABLE, kernel="load_first_row_kept"), "step 5 of 40 rows"),
    "a replay's adapters": (graphs(CAPTURABLE, kernel="load_set_once"), "step 5 of 40 rows"),
    "no graphs": (graphs(TORCH), "'torch' cannot be captured"),
}


@pytest.mark.parametrize("trial", RIGHT.values(), ids=RIGHT)
def test_what_computes_rightly_has_no_problem(trial):
    assert run_trial(trial) is None


@pytest.mark.parametrize(("trial", "told"), WRONG.values(), ids=WRONG)
def test_every_mistake_is_found(trial, told):
    problem = run_trial(trial)

    assert problem is not None
    assert told in problem


def compared(change, dtype=torch.bfloat16):
    """What `off` says of rows that `change` made wrong, of which the readable form lost what rounding takes."""
    exact = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    readable = exact.to(dtype)
    found = readable.clone()
    change(found)
    return off(found, readable, exact)


def test_a_row_that_is_off_by_more_than_rounding_is_told():
    def change(rows):
        rows[15] *= 1.03

    assert "in row 15" in compared(change)
    assert "in row 15" in compared(change, torch.float32)


def test_one_number_of_a_wide_row_is_found():
    def change(rows):
        rows[15, 7] += 0.5

    assert "of the largest number" in compared(change)


def test_numbers_rounded_the_other_way_are_right():
    def change(rows):
        rows.view(torch.int16)[::2] += 1  # one unit in the last place

    assert compared(change) is None


def test_a_number_near_zero_is_judged_by_those_beside_it():
    exact = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    exact[7] = 1e-3  # what is left of larger numbers
    found = exact.clone()
    found[7] += 1e-7

    assert off(found, exact, exact) is None
    found[8] *= 1.001
    assert "in row 0" in off(found, exact, exact)


def test_trials_travel_as_json():
    for trial in RIGHT.values():
        assert TRIAL.validate_json(TRIAL.dump_json(trial)) == trial


# --- in a process of their own ---


@pytest.fixture
def settings(tmp_path):
    return changed(Settings(), cache=tmp_path / "cache")


def test_a_crash_is_a_verdict_and_what_comes_after_it_is_tried(settings):
    orders = [attention("Aborts"), attention("CapForgotten")]
    seen = []

    verdicts = Trials(settings, MACHINE).verdicts(orders, seen=seen.append)

    assert [verdict.trial for verdict in verdicts] == orders
    assert verdicts == seen
    assert verdicts[0].problem == "the process of the trial ended with SIGABRT"
    assert "off by" in verdicts[1].problem


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """What compilers that a trial started wrote; its end is read when none of them runs any more."""
    path = tmp_path / "compiler"
    os.mkfifo(path)
    monkeypatch.setenv("COMPILER", str(path))
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as reader:
        os.set_blocking(reader.fileno(), True)
        yield reader


def test_a_hang_is_a_verdict_and_compilers_end_with_it(settings, compiler):
    verdicts = Trials(settings, MACHINE, seconds=6).verdicts([attention("HangsOverACompiler", (PLAIN,))])

    assert verdicts[0].problem == "it took longer than 6 s"
    # Nothing, where a slow machine had started none by then.
    assert within(30, compiler.read) in (b"started", b"")


def test_compilers_end_with_a_trial_that_dies(settings, compiler):
    problem = Trials(settings, MACHINE).problem(attention("DiesOverACompiler", (PLAIN,)))

    assert problem == "the process of the trial ended with SIGKILL"
    assert within(30, compiler.read) == b"started"


def test_a_verdict_is_kept_until_the_machine_or_the_trial_is_another(settings, monkeypatch):
    trial = attention("Refuses")
    Trials(settings, MACHINE).problem_here(trial)
    ran = []
    monkeypatch.setattr(Trials, "_run", lambda _, trial: ran.append(trial))

    kept = Trials(settings, MACHINE).verdicts([trial])
    other = Trials(settings, {"gpu": "another"}).verdicts([trial])
    again = Trials(settings, MACHINE).verdicts([trial], again=True)
    different = Trials(settings, MACHINE).verdicts([attention("Refuses", page_size=32)])

    assert [one.kept for (one,) in (kept, other, again, different)] == [True, False, False, False]
    assert kept[0].problem == "RuntimeError: refuses the model: not today"
    assert len(ran) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"trial": "x"}', '{"problem": ""}', '{"problem": 5}'])
def test_a_verdict_that_cannot_be_read_is_made_again(settings, content, monkeypatch):
    monkeypatch.setattr(Trials, "_run", lambda _, __: "wrong")
    trial = attention(TORCH)
    Trials(settings, MACHINE).verdicts([trial])
    (file,) = (settings.cache / "trials").iterdir()
    file.write_text(content)

    (verdict,) = Trials(settings, MACHINE).verdicts([trial])

    assert (verdict.problem, verdict.kept) == ("wrong", False)
    assert json.loads(file.read_text())["problem"] == "wrong"


def test_a_folder_that_others_may_write_to_is_not_believed(settings, monkeypatch):
    monkeypatch.setattr(Trials, "_run", lambda _, __: "wrong")
    trial = attention(TORCH)
    Trials(settings, MACHINE).verdicts([trial])
    (settings.cache / "trials").chmod(0o777)

    (verdict,) = Trials(settings, MACHINE).verdicts([trial])

    assert not verdict.kept


def test_a_cache_that_cannot_be_written_keeps_nothing_and_fails_nothing(settings, monkeypatch):
    monkeypatch.setattr(Trials, "_run", lambda _, __: None)
    settings.cache.write_text("no folder")

    assert Trials(settings, MACHINE).problem(attention(TORCH)) is None


def test_verdicts_depend_on_the_versions_of_what_computes():
    facts = machine()

    assert {"lorax-core", "torch", "python"} <= set(facts)
    assert facts["torch"].startswith("2.")


def test_what_is_printed_in_a_trial_is_no_verdict(settings):
    assert Trials(settings, MACHINE).problem(attention("Prints", (PLAIN,))) is None


def test_modules_of_the_current_folder_do_not_run(settings, tmp_path, monkeypatch):
    (tmp_path / "safetensors.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])

    assert Trials(settings, MACHINE).problem(attention(TORCH, (PLAIN,))) is None


@pytest.mark.parametrize("backend", ["OutOfMemory", "Killed"])
def test_what_may_be_otherwise_the_next_time_is_not_kept(settings, backend):
    trials = Trials(settings, MACHINE)
    trial = attention(backend, (PLAIN,))

    # Whoever is killed needs a process of its own.
    problem = trials.problem(trial) if backend == "Killed" else trials.problem_here(trial)

    assert problem is not None
    assert not (settings.cache / "trials").exists()


def test_a_fault_of_one_trial_does_not_reach_the_next(settings):
    verdicts = Trials(settings, MACHINE).verdicts([attention("BreaksItsProcess", (PLAIN,)), attention(TORCH, (PLAIN,))])

    assert "illegal memory access" in verdicts[0].problem
    assert verdicts[1].problem is None


def test_a_backend_whose_code_changed_is_tried_again(settings, tmp_path, monkeypatch):
    module = tmp_path / "theirs.py"
    module.write_text("from lorax_core.attention.torch import TorchBackend")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(Trials, "_run", lambda _, __: None)
    trial = attention("theirs:TorchBackend", (PLAIN,))
    first, second = (Trials(settings, MACHINE).verdicts([trial])[0] for _ in range(2))

    module.write_text("from lorax_core.attention.torch import TorchBackend  # another version")

    assert [first.kept, second.kept] == [False, True]
    assert not Trials(settings, MACHINE).verdicts([trial])[0].kept


def test_verdicts_are_kept_whatever_the_umask(settings, monkeypatch):
    monkeypatch.setattr(Trials, "_run", lambda _, __: None)
    before = os.umask(0o002)
    try:
        first, second = (Trials(settings, MACHINE).verdicts([attention(TORCH)])[0] for _ in range(2))
    finally:
        os.umask(before)

    assert [first.kept, second.kept] == [False, True]


@pytest.mark.parametrize("window", [3, 130, 255, 4096, 131_072])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_window_of_one_key_too_many_is_found_at_any_width(window, dtype):
    wide = PLAIN.model_copy(update={"window": window})

    assert "off by" in run_trial(attention("WindowOffByOne", (wide,), dtype=dtype, kv_dtype=dtype))
    assert run_trial(attention(TORCH, (wide,), dtype=dtype, kv_dtype=dtype)) is None


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_forgotten_cap_is_found_at_any_height(cap, dtype):
    capped = PLAIN.model_copy(update={"soft_cap": cap})

    assert "off by" in run_trial(attention("CapForgotten", (capped,), dtype=dtype, kv_dtype=dtype))
    assert run_trial(attention(TORCH, (capped,), dtype=dtype, kv_dtype=dtype)) is None
