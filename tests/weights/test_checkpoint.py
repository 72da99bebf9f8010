from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from builders import change_json, change_tensors, make_qwen2, make_qwen2_model
from safetensors.torch import load_file, save_file

from lorax_core.errors import CheckpointError
from lorax_core.weights.checkpoint import Checkpoint, TensorReader

LFS_POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 90868376
"""


def resident_bytes(file):
    """How much of a mapped file counts as memory of this process."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text("ascii"))
    found = [int(re.search(r"Rss: *([0-9]+) kB", part)[1]) for part in parts if str(file) in part.partition("\n")[0]]
    return sum(found) * 1024


def make_sharded(folder):
    make_qwen2_model().save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_tensors_of_a_sharded_checkpoint_are_all_read(tmp_path):
    single, sharded = make_qwen2(tmp_path / "single"), make_sharded(tmp_path / "sharded")

    checkpoint = Checkpoint(sharded)
    reader = TensorReader(checkpoint)
    read = {name: reader(name) for name in checkpoint.tensors}

    known = load_file(single / "model.safetensors")
    assert read.keys() == known.keys()
    assert all(torch.equal(read[name], known[name]) for name in known)


def test_a_shard_that_the_index_names_and_nobody_copied_is_named(tmp_path):
    folder = make_sharded(tmp_path)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()

    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)

    assert repr(lost.name) in caught.value.message
    assert "download" in caught.value.hint


def test_a_tensor_in_two_shards_is_refused_with_both(tmp_path):
    folder = make_sharded(tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    twice = load_file(first)[name]
    change_tensors(second, lambda tensors: {**tensors, name: twice})

    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)

    assert all(part in caught.value.message for part in (repr(name), first.name, second.name))


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    folder = make_qwen2(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)

    with pytest.raises(CheckpointError, match="has no 'weight_map'"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:5],
        lambda whole: b"",
        lambda whole: b"\xff" * 8 + whole[8:],
        lambda whole: LFS_POINTER.encode(),
        lambda whole: b"<!DOCTYPE html><html><body>404</body></html>",
    ],
    ids=["cut in half", "cut in the header", "empty", "wild header", "Git LFS pointer", "a web page"],
)
def test_a_damaged_weight_file_is_named_with_its_size(tmp_path, damage):
    file = make_qwen2(tmp_path) / "model.safetensors"
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)

    with pytest.raises(CheckpointError) as caught:
        list(Checkpoint(tmp_path).read())

    assert str(file) in caught.value.message
    assert f"{len(damaged)} bytes" in caught.value.message
    assert "Git LFS pointer" in caught.value.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_weights_only_as_a_pickle_are_refused_with_the_way_out(tmp_path, name):
    folder = make_qwen2(tmp_path)
    (folder / "model.safetensors").rename(folder / name)

    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)

    assert repr(name) in caught.value.message
    assert "save_pretrained" in caught.value.hint


def test_a_folder_without_weights_is_refused_with_what_it_holds(tmp_path):
    folder = make_qwen2(tmp_path)
    (folder / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"no model\.safetensors") as caught:
        Checkpoint(folder)

    assert "'config.json'" in caught.value.message


def test_a_quantised_checkpoint_is_refused_by_its_method(tmp_path):
    folder = make_qwen2(tmp_path)
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    with pytest.raises(CheckpointError, match="'gptq'"):
        Checkpoint(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere' does not exist"):
        Checkpoint(tmp_path / "nowhere")


def test_a_small_file_beside_the_weights_is_read_or_not_there(tmp_path):
    folder = make_qwen2(tmp_path)
    (folder / "list.json").write_text("[1]")

    checkpoint = Checkpoint(folder)

    assert checkpoint.json("list.json") == [1]
    assert checkpoint.json("nothing.json") is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"3"])
def test_a_small_file_that_is_damaged_is_named(tmp_path, content):
    folder = make_qwen2(tmp_path)
    (folder / "modules.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"modules\.json"):
        Checkpoint(folder).json("modules.json")


def test_an_index_counts_before_a_single_file(tmp_path):
    folder = make_sharded(tmp_path)
    save_file({"stale": torch.zeros(1)}, folder / "model.safetensors")

    checkpoint = Checkpoint(folder)

    assert "stale" not in checkpoint.tensors
    assert (
        checkpoint.tensors.keys()
        == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].keys()
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what of a file is mapped")
def test_what_was_read_of_a_file_does_not_stay_mapped(tmp_path):
    checkpoint = Checkpoint(make_qwen2(tmp_path, vocab_size=4096))
    reader = TensorReader(checkpoint, most_mapped=2**16)

    numbers = {name: reader(name).clone() for name in checkpoint.tensors}

    mapped = resident_bytes(checkpoint.files[0])
    assert mapped < sum(tensor.nbytes for tensor in numbers.values()) / 2
    known = load_file(checkpoint.files[0])
    assert all(torch.equal(numbers[name], known[name]) for name in known)


@pytest.mark.parametrize("how", ["replaced", "written again"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, how):
    tensors = {name: torch.full((64, 64), value) for name, value in (("a", 1.0), ("b", 2.0))}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    reader = TensorReader(Checkpoint(tmp_path), most_mapped=0)
    reader("a")
    save_file({name: 3 * tensor[:, :32].contiguous() for name, tensor in tensors.items()}, tmp_path / "other")
    if how == "replaced":
        (tmp_path / "other").replace(tmp_path / "model.safetensors")
    else:
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "other").read_bytes())

    with pytest.raises(CheckpointError, match="was changed while it was read"):
        reader("b")


def test_a_file_that_there_is_no_room_to_map_is_not_called_damaged(tmp_path):
    class NoRoom:
        def get_tensor(self, name):
            raise RuntimeError("unable to mmap 59793864 bytes from file <x>: Cannot allocate memory (12)")

    checkpoint = Checkpoint(make_qwen2(tmp_path))
    reader = TensorReader(checkpoint)
    reader._open[checkpoint.files[0]] = NoRoom()

    with pytest.raises(CheckpointError) as caught:
        reader(next(iter(checkpoint.tensors)))

    assert isinstance(caught.value.__cause__, MemoryError)  # which loading takes for what it is
