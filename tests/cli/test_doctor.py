from __future__ import annotations

import json

import faulty_kernels
import torch

import lorax_core


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


def test_verify_tries_the_kernels_of_this_machine(main, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))

    code, out, _ = main("doctor", "--verify", "--json")

    told = json.loads(out)
    assert code == 0
    assert told["machine"]["torch"] == torch.__version__
    assert {one["trial"]["kind"] for one in told["trials"]} >= {"lora"}
    assert [one["problem"] for one in told["trials"]] == [None] * len(told["trials"])
    assert told["refused"]["flashinfer"] == "runs on 'cuda', not on 'cpu'"
    assert "CUDA" in told["refused"]["elementwise"]


def test_a_kernel_that_fails_its_trial_counts(main, monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "lorax_core.serving.trial.standard.KERNELS", (("cut", faulty_kernels.load_ranks_cut),), raising=True
    )

    code, out, _ = main("doctor", "--verify")

    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("load_ranks_cut"))
    assert "896 to 1152: off by" in line
