"""Files of a checkpoint that are none, or that lie about themselves: pipes, broken links, names that lead out, odd headers."""

from __future__ import annotations

import json
import os
import struct

import pytest
import torch
from builders import make_qwen2, make_qwen2_model, make_sentence_files
from rigs import make_loaded
from safetensors.torch import save_file

from lorax_core.errors import CheckpointError
from lorax_core.weights.checkpoint import HEADER_BYTES, Checkpoint
from lorax_core.weights.hub import find_checkpoint
from lorax_core.weights.sentence import read_sentence_files

INDEX = "model.safetensors.index.json"


def make_pipe(file):
    os.mkfifo(file)


def make_endless(file):
    file.symlink_to("/dev/zero")


def make_dangling(file):
    file.symlink_to("nowhere")


def make_loop(file):
    file.symlink_to(file.name)


def make_folder(file):
    file.mkdir()


ODD = [make_pipe, make_endless, make_dangling, make_loop, make_folder]


def as_snapshot(folder, cache):
    """The files of a folder as the hub's client keeps them: a snapshot of links into `blobs/`."""
    blobs, snapshot = cache / "blobs", cache / "snapshots/0123abcd"
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        (blobs / f"blob{number}").write_bytes(file.read_bytes())
        link.symlink_to(os.path.relpath(blobs / f"blob{number}", link.parent))
    return snapshot


def make_sharded(folder):
    make_qwen2_model().save_pretrained(folder, max_shard_size="60KB")
    return folder


def test_a_snapshot_of_the_hub_is_links_and_loads(tmp_path, host):
    folder = make_sentence_files(make_sharded(tmp_path / "plain"))
    snapshot = as_snapshot(folder, tmp_path / "models--a--b")

    linked, plain = Checkpoint(snapshot), Checkpoint(folder)

    assert linked.tensors.keys() == plain.tensors.keys()
    assert read_sentence_files(linked) == read_sentence_files(plain)
    assert make_loaded(snapshot, host).model.sites.keys() == make_loaded(folder, host).model.sites.keys()


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "sub/../../out.safetensors", "{out}", "..", "a\0b", "", 5, None]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path, name):
    out = make_qwen2(tmp_path / "other", tokenizer=False) / "model.safetensors"
    out = out.rename(tmp_path / "out.safetensors")
    folder = make_sharded(tmp_path / "folder")
    index = json.loads((folder / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name.format(out=out) if isinstance(name, str) else name
    (folder / INDEX).write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="names the file"):
        Checkpoint(folder)


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_file_that_is_none_is_refused_at_once(tmp_path, name, make):
    folder = make_qwen2(tmp_path, tokenizer=False)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)

    with pytest.raises(CheckpointError, match=r"is not a regular file|cannot be read") as caught:
        Checkpoint(folder)

    assert str(folder / name) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("make", ODD)
def test_a_shard_that_is_no_file_is_refused_at_once(tmp_path, make):
    folder = make_sharded(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    make(shard)

    with pytest.raises(CheckpointError, match=r"is not a regular file|cannot be read") as caught:
        Checkpoint(folder)

    assert str(shard) in caught.value.message


@pytest.mark.parametrize("make", ODD)
@pytest.mark.parametrize(
    "name",
    ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"],
)
def test_a_small_file_that_is_none_is_not_taken_for_absent(tmp_path, name, make):
    folder = make_sentence_files(make_qwen2(tmp_path, tokenizer=False))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)

    with pytest.raises(CheckpointError, match=r"is not a regular file|cannot be read") as caught:
        read_sentence_files(Checkpoint(folder))

    assert str(folder / name) in caught.value.message
    assert caught.value.hint


def write_header(file, header, numbers=b"\0\0\0\0"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**ONE, "shape": [10**12]}},
        {"a": {**ONE, "shape": [2**63, 4]}},
        {"a": {**ONE, "shape": [-1]}},
        {"a": {**ONE, "shape": "1"}},
        {"a": {**ONE, "dtype": "F33"}},
        {"a": {**ONE, "data_offsets": [0, 10**15]}},
        {"a": {**ONE, "data_offsets": [4, 0]}},
        {"a": {**ONE, "data_offsets": [0, 2]}},
        {"a": ONE, "b": ONE},
        {"a": ONE, "__metadata__": {"format": 5}},
        {"a": ONE, "__metadata__": []},
        {"a": 5},
        [ONE],
        b'{"a": ' + b"[" * 100_000,
        b"{" + b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},' * 2 + b"}",
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        {"a" * 10_000: ONE},
    ],
    ids=range(17),
)
def test_a_header_that_lies_is_refused_with_the_file(tmp_path, header):
    file = make_qwen2(tmp_path, tokenizer=False) / "model.safetensors"
    write_header(file, header)

    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)

    assert str(file) in caught.value.message
    assert caught.value.hint


def test_a_header_larger_than_any_models_is_refused_before_it_is_read(tmp_path):
    file = make_qwen2(tmp_path, tokenizer=False) / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", HEADER_BYTES + 1))
        opened.truncate(HEADER_BYTES + 100)

    with pytest.raises(CheckpointError, match="at most 33,554,432 are read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "np"}, {"format": "pt", "odd": "\n" * 5}])
def test_what_a_file_says_of_itself_does_not_matter(tmp_path, metadata):
    file = make_qwen2(tmp_path, tokenizer=False) / "model.safetensors"
    save_file({"a.b": torch.ones(2, 3), "": torch.ones(())}, file, metadata=metadata)

    found = Checkpoint(tmp_path).tensors

    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {"a.b": ((2, 3), "F32"), "": ((), "F32")}


@pytest.mark.parametrize(
    "source", ["a\0b", "x" * 5000, "x" * 300 + "/y/z", 5, None, "~nobody-of-that-name/model", "", "\n", "/"]
)
def test_a_path_that_no_folder_can_have_is_a_checkpoint_error(source):
    with pytest.raises(CheckpointError):
        Checkpoint(find_checkpoint(source))
