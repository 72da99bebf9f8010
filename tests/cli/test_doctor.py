from __future__ import annotations

import json

import faulty_kernels
import pytest
import torch
from builders import make_lora, make_qwen2, make_qwen2_model
from caches import fresh_cache

import lorax_core
from lorax_core.plugins.host import PluginHost
from lorax_core.serving.trial import standard
from lorax_core.serving.trial.run import Trials, Verdict
from lorax_core.settings import Settings


def test_doctor_tells_versions_backends_with_reasons_and_plugins(main):
    code, out, _ = main("doctor", "--json")

    told = json.loads(out)
    assert (code, told["schema"], told["problems"]) == (0, 1, [])
    assert told["versions"]["lorax-core"] == lorax_core.__version__
    assert told["versions"]["torch"] == torch.__version__
    elsewhere = "runs on 'cuda', not on 'cpu'"
    reasons = {one["name"]: one["reason"] for one in told["attention"]}
    assert reasons == {"flashinfer": elsewhere, "flash_attn": elsewhere, "native": None, "torch": None}
    assert told["machine"]["threads"] == torch.get_num_threads()
    assert told["machine"]["low-rank kernel"]
    assert told["machine"]["elementwise kernels"].startswith("native: ")
    assert "compute capability" not in told["machine"]  # of a GPU, and there is none
    assert "ready" in told["plugins"]["qwen2"]


def test_the_table_has_a_line_for_each_fact(main):
    code, out, _ = main("doctor")

    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["attention", "torch", "usable"] in lines
    assert ["versions", "lorax-core", lorax_core.__version__] in lines


def test_a_plugin_that_failed_is_told_and_counts(main, monkeypatch):
    monkeypatch.setenv("LORAX_PLUGINS", "qwen2,no-such-plugin")

    code, out, err = main("doctor", "--json")

    assert code == 1
    assert [problem["plugin"] for problem in json.loads(out)["problems"]] == ["no-such-plugin"]
    assert "no-such-plugin" in err


# --- kernels ---


@pytest.fixture
def small(monkeypatch):
    """Fewer and smaller shapes than those of real models, in whose place they stand; and one dtype, as on a GPU."""
    kinds = dict(list(standard._KINDS.items())[:1])
    monkeypatch.setattr(standard, "sixteen_bit", lambda device: torch.bfloat16)
    monkeypatch.setattr(standard, "_KINDS", kinds)
    monkeypatch.setattr(standard, "_SIZES", ((64, 96),))


def test_the_shapes_that_are_tried_are_those_of_real_models():
    kinds = [kind for kinds in standard._KINDS.values() for kind in kinds]

    assert {kind.head_dim for kind in kinds} >= {64, 128}
    assert {kind.causal for kind in kinds} == {True, False}
    assert any(kind.window for kind in kinds)
    assert any(kind.soft_cap for kind in kinds)
    assert max(max(size) for size in standard._SIZES) > 4000


def test_verify_tries_the_kernels_of_this_machine(main, monkeypatch, tmp_path, small):
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))

    code, out, _ = main("doctor", "--verify", "--json")

    told = json.loads(out)
    assert code == 0
    assert told["machine"]["torch"] == torch.__version__
    assert {one["trial"]["kind"] for one in told["trials"]} == {"attention", "lora", "elementwise"}
    assert [one["problem"] for one in told["trials"]] == [None] * len(told["trials"])
    assert told["refused"]["flashinfer"] == "runs on 'cuda', not on 'cpu'"
    assert "elementwise" not in told["refused"]


def test_a_kernel_that_fails_its_trial_counts(main, monkeypatch, tmp_path, small):
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))
    monkeypatch.setattr(
        "lorax_core.serving.trial.standard.KERNELS", (("cut", faulty_kernels.load_ranks_cut),), raising=True
    )
    monkeypatch.setattr(standard, "_KINDS", {})  # of attention

    code, out, _ = main("doctor", "--verify")

    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("load_ranks_cut"))
    assert "64 to 96, few rows: off by" in line


def test_a_backend_that_failed_a_trial_is_told_with_the_reason(main, monkeypatch, tmp_path, small):
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))
    settings = Settings.from_env()
    tried, _ = standard.standard_trials(PluginHost.discover().backends, "cpu", settings)
    native = next(trial for trial in tried if trial.kind == "attention")
    Trials(settings)._keep(Verdict(native, "off by 7"))

    _, out, _ = main("doctor", "--json")

    reasons = {one["name"]: one["reason"] for one in json.loads(out)["attention"]}
    assert reasons["native"] == "failed a trial, and is not used for such layers: off by 7"
    assert reasons["torch"] is None


def test_what_was_verified_for_a_checkpoint_is_not_tried_again_by_an_engine(main, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", fresh_cache(tmp_path / "cache"))
    monkeypatch.setenv("LORAX_TRIALS", "all")
    folder, adapter = make_qwen2(tmp_path / "model"), make_lora(make_qwen2_model(), tmp_path / "adapter")

    code, out, _ = main("doctor", "--verify", str(folder), "--json")
    monkeypatch.setattr(Trials, "_run", lambda _, trials: pytest.fail(f"tried again: {trials}"))
    with lorax_core.load(folder, adapters={"it": adapter}, kv_cache_tokens=64) as engine:
        info = engine.info()

    assert code == 0
    assert {one["trial"]["kind"] for one in json.loads(out)["trials"]} == {"attention", "lora", "elementwise"}
    assert (info.attention, info.lora_kernel[0]) == ("native", "native")


def test_a_checkpoint_is_for_verify(main):
    code, _, err = main("doctor", "somewhere")

    assert code == 2
    assert "--verify" in err
