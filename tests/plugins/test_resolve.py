"""Class paths and `config.json`."""

from __future__ import annotations

import json

import pytest

from lorax_core.errors import CheckpointError, PluginError
from lorax_core.plugins.record import PluginRecord, PluginStatus
from lorax_core.plugins.resolve import load_class, read_config

RECORD = PluginRecord("stranger", "lorax-stranger", "1.0", "lorax_stranger.plugin", PluginStatus.READY)


def make_module(strangers, code):
    strangers.install()
    (strangers.folder / "lorax_stranger/modeling.py").write_text(code, encoding="utf-8")
    return "lorax_stranger.modeling:StrangerModel"


def test_a_class_is_found(importable_strangers):
    path = make_module(importable_strangers, "class StrangerModel: ...")

    assert load_class(path, RECORD).__name__ == "StrangerModel"
    assert load_class("lorax_core.plugins.host:PluginHost", None).__name__ == "PluginHost"


@pytest.mark.parametrize(
    ("code", "cause", "hint"),
    [
        ("import not_there.at_all", "ModuleNotFoundError: No module named 'not_there'", "is 'not_there' installed?"),
        ("from json import nothing", "ImportError: cannot import name 'nothing'", "pip install --upgrade"),
        ("def broken(:", "SyntaxError", "pip install --upgrade lorax-stranger"),
        ("1 / 0", "ZeroDivisionError", "pip install --upgrade lorax-stranger"),
    ],
)
def test_a_failing_import_names_plugin_module_and_cause(importable_strangers, code, cause, hint):
    path = make_module(importable_strangers, code)

    with pytest.raises(PluginError) as caught:
        load_class(path, RECORD)

    assert "plugin 'stranger' (lorax-stranger 1.0): importing lorax_stranger.modeling failed" in caught.value.message
    assert cause in caught.value.message
    assert hint in caught.value.hint
    assert type(caught.value.__cause__).__name__ in caught.value.message


def test_a_missing_class_answers_with_the_nearest_one(importable_strangers):
    path = make_module(importable_strangers, "class StrangerModell: ...")

    with pytest.raises(PluginError, match=r"module lorax_stranger\.modeling has no class 'StrangerModel'") as caught:
        load_class(path, RECORD)

    assert caught.value.hint == "did the plugin mean 'StrangerModell'?"
    assert isinstance(caught.value.__cause__, AttributeError)


def test_something_else_than_a_class_is_refused(importable_strangers):
    path = make_module(importable_strangers, "StrangerModel = 3")

    with pytest.raises(PluginError, match="is not a class but 3"):
        load_class(path, RECORD)


def test_a_config_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "stranger", "layers": 2}), encoding="utf-8")

    assert read_config(tmp_path) == {"model_type": "stranger", "layers": 2}
    assert read_config(str(tmp_path)) == read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{\n  "model_type": "stranger",\n}', "is not JSON: .* in line 3, column 1"),
        (b"", "is not JSON: Expecting value in line 1"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "holds a list where a JSON object belongs"),
        (b"null", "holds null where"),
        (b"{}", "names no model_type"),
        (b'{"model_type": 3}', "has 3 for model_type"),
    ],
)
def test_a_bad_config_is_told_with_its_file(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)

    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)

    assert str(tmp_path / "config.json") in caught.value.message


def test_a_missing_folder_or_config_is_reported(tmp_path):
    (tmp_path / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        read_config(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)
