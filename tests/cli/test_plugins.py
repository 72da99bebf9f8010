"""`lorax plugins` among strangers that are really installed."""

from __future__ import annotations

import json

import pytest

from lorax_core.plugins import ArchitectureSpec
from lorax_core.plugins.record import PluginRecord, PluginStatus

SLOW = """
import torch

from lorax_core.plugins import ArchitectureSpec, Task, hookimpl

@hookimpl
def lorax_architectures():
    yield ArchitectureSpec(
        model_type="slow",
        summary="Imports torch to say its name.",
        api=1,
        config="lorax_bert.config:BertConfig",
        backbone="lorax_bert.modeling:FlashBertModel",
        tasks=(Task.EMBED,),
        hf_architectures={},
        default_task=Task.EMBED,
        causal=False,
        cases="lorax_bert.cases:BERT",
    )
"""
PARTS = """
class Config: ...
class Model: ...
class Head: ...
class Backend: ...
"""
"""What a doctor looks for, in a module that needs no torch."""
SOUND = {
    "config": "parts:Config",
    "backbone": "parts:Model",
    "heads": {"embed": "parts:Head"},
    "cases": "lorax_bert.cases:BERT",
}
REAL = {
    **SOUND,
    "config": "lorax_bert.config:BertConfig",
    "backbone": "lorax_bert.modeling:FlashBertModel",
    "heads": {},
}
"""Classes that are there; the real ones import torch."""
BACKEND = """
from lorax_core.plugins import BackendSpec, hookimpl

@hookimpl
def lorax_attention_backends():
    yield BackendSpec(name="fast", summary="Fast.", backend="parts:Backendd", device_types=("cpu",))
"""


def statuses(done):
    return {plugin["package"]: plugin["status"] for plugin in json.loads(done.stdout)["plugins"]}


def test_the_list_has_core_and_what_each_plugin_brings(main):
    code, out, err = main("plugins", "list")

    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert (code, err) == (0, "")
    assert rows["core"][1:] == [
        "lorax-core",
        rows["core"][2],
        "-",
        "flashinfer,",
        "flash_attn,",
        "native,",
        "torch",
        "ready",
    ]
    assert rows["qwen2"][1:] == ["lorax-qwen2", rows["qwen2"][2], "qwen2", "-", "ready"]


def test_all_lists_what_cannot_be_used_too_and_strict_settings_do_not_get_in_the_way(lorax, strangers):
    strangers.install("lorax-bad", "raise RuntimeError('no luck')")
    strangers.install("lorax-unwanted")

    usable = lorax("plugins", "list", "--json", LORAX_STRICT="1", LORAX_BLOCK_PLUGINS="unwanted")
    everything = lorax("plugins", "list", "--json", "--all", LORAX_STRICT="1", LORAX_BLOCK_PLUGINS="unwanted")

    assert not {"lorax-bad", "lorax-unwanted"} & set(statuses(usable))
    assert statuses(everything)["lorax-bad"] == "broken"
    assert statuses(everything)["lorax-unwanted"] == "blocked"
    assert json.loads(usable.stdout)["problems"][0]["package"] == "lorax-bad"
    assert "lorax-bad 1.0 is broken" in usable.stderr


def test_the_json_of_a_plugin_has_its_declarations(main):
    _, out, _ = main("plugins", "list", "--json")

    plugins = {plugin["package"]: plugin for plugin in json.loads(out)["plugins"]}
    (spec,) = plugins["lorax-qwen2"]["architectures"]
    assert ArchitectureSpec.model_validate(spec).model_type == "qwen2"
    assert [one["name"] for one in plugins["lorax-core"]["backends"]] == ["flashinfer", "flash_attn", "native", "torch"]
    assert plugins["lorax-qwen2"]["import_seconds"] > 0


BROKEN = {
    "config": ({"config": "parts:Configuration"}, "module parts has no class 'Configuration'"),
    "backbone": ({"backbone": "parts:Modell"}, "module parts has no class 'Modell'"),
    "module": (
        {"backbone": "lorax_stranger.modeling:Model"},
        "importing lorax_stranger.modeling failed: ModuleNotFoundError",
    ),
    "head": ({"heads": {"embed": "parts:Embedder"}}, "module parts has no class 'Embedder'"),
    "cases": ({"cases": "lorax_bert.cases:BERTHA"}, "module lorax_bert.cases has no object 'BERTHA'"),
}
"""What a declaration names that is not there, and what is said of it."""


@pytest.fixture
def said(lorax, strangers):
    """What the doctor says of each of many plugins, by package; each is examined in a process of its own."""
    (strangers.folder / "parts.py").write_text(PARTS)
    for name, (fields, _) in BROKEN.items():
        strangers.install(f"lorax-no-{name}", **{**SOUND, "model_type": name, **fields})
    strangers.install("lorax-fast", BACKEND)
    strangers.install("lorax-sound", **REAL)
    strangers.install("lorax-slow", SLOW)
    strangers.install("lorax-crash", "import os, sys\nprint('last words', file=sys.stderr, flush=True)\nos._exit(7)")
    strangers.install("lorax-one", model_type="contested", **SOUND)
    strangers.install("lorax-two", model_type="contested", **SOUND)
    names = [*(f"no-{name}" for name in BROKEN), "fast", "sound", "slow", "crash", "one", "two", "lorax-misspelt"]

    done = lorax("plugins", "doctor", "--json", LORAX_PLUGINS=",".join(names), LORAX_STRICT="1")

    assert done.returncode == 0
    return {plugin["package"]: plugin for plugin in json.loads(done.stdout)["plugins"]}


# One test, because each plugin that is examined takes a second or two.
def test_doctor_finds_what_is_not_there_and_survives_what_would_end_its_own_process(said):
    for name, (_, told) in BROKEN.items():
        broken = said[f"lorax-no-{name}"]
        assert (broken["status"], broken["architectures"]) == ("broken", [])
        assert told in broken["cause"]
        assert broken["hint"]
    assert said["lorax-fast"]["status"] == "broken"
    assert "module parts has no class 'Backendd'" in said["lorax-fast"]["cause"]
    assert (said["lorax-sound"]["status"], said["lorax-sound"]["cause"]) == ("ready", None)
    assert [spec["model_type"] for spec in said["lorax-sound"]["architectures"]] == ["stranger"]
    assert said["lorax-slow"]["status"] == "slow-import"
    assert "imported torch" in said["lorax-slow"]["cause"]
    assert said["lorax-crash"]["cause"] == "importing it ended the process with exit code 7: last words"
    assert "model type 'contested' is claimed by lorax-two" in said["lorax-one"]["cause"]
    assert said["lorax-misspelt"]["cause"] == "LORAX_PLUGINS names 'lorax-misspelt', which is not installed"
    assert said["lorax-bert"]["status"] == "blocked"
    assert said["lorax-core"]["status"] == "ready"


def test_doctor_starts_no_process_for_what_is_blocked(main, monkeypatch):
    probed = []

    def probe(entry, timeout):
        probed.append(entry.name)
        return PluginRecord(entry.name, f"lorax-{entry.name}", "1.0", entry.value, PluginStatus.READY)

    monkeypatch.setattr("lorax_core.cli.plugins._probe_apart", probe)
    monkeypatch.setenv("LORAX_PLUGINS", "qwen2")

    main("plugins", "doctor")

    assert sorted(probed) == ["core", "qwen2"]


def test_doctor_does_not_wait_for_ever(lorax, strangers):
    strangers.install("lorax-hangs", "import threading\nthreading.Event().wait()")

    done = lorax("plugins", "doctor", "--timeout", "1", LORAX_PLUGINS="hangs")

    row = next(line for line in done.stdout.splitlines() if line.startswith("hangs"))
    assert "broken" in row
    assert "importing it took longer than 1 s" in row


def test_an_import_of_torch_is_noticed_and_the_plugin_used_all_the_same(lorax, strangers):
    strangers.install("lorax-slow", SLOW)

    listed = lorax("models", "list", "--json", LORAX_PLUGINS="slow")

    assert json.loads(listed.stdout)["models"][0]["status"] == "slow-import"
    assert json.loads(listed.stdout)["problems"] == []
    assert "plugin lorax-slow 1.0 is slow-import: importing its declaration imported torch" in listed.stderr
    assert "hint: name classes by strings in plugin.py" in listed.stderr
