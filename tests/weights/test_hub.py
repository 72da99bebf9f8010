from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorax_core.errors import CheckpointError
from lorax_core.weights.hub import find_checkpoint

OFFLINE = """
import lorax_core as lorax

for revision in (None, "v2"):
    try:
        lorax.load("nobody-at-all/no-such-model", revision=revision)
    except lorax.CheckpointError as error:
        print(error.message, "|", error.hint)
"""


def test_a_folder_is_itself(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_file_is_refused_with_its_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()

    with pytest.raises(CheckpointError, match="is a file") as caught:
        find_checkpoint(file)

    assert str(tmp_path) in caught.value.hint


@pytest.mark.parametrize(
    "source", ["./nowhere", "no-such-folder", "/no/such/folder", "a/b/c", "some where/else", "-x/y"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_with_both_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message
    assert "config.json" in caught.value.hint
    assert "Qwen/" in caught.value.hint


@pytest.mark.parametrize("source", ["acme/two--dashes", "acme/dots..dots", "acme/ends-", "acme/" + "x" * 100])
def test_an_id_that_the_hub_cannot_have_is_a_checkpoint_error_too(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message


def test_an_id_that_cannot_be_reached_is_told_with_what_to_try(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    done = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    plain, revised = done.stdout.splitlines()
    assert "there is no folder 'nobody-at-all/no-such-model' here, and the hub did not give it" in plain
    assert "offline, only what was downloaded before" in plain
    assert "at revision 'v2'" in revised
