"""`benchmarks/peers`: contestants in turns over a tiny model, and what is told and plotted of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from builders import make_bert, make_qwen2
from rich.progress import Progress
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("peers_run", ROOT / "benchmarks/peers/run.py")
    module = sys.modules["peers_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["peers_run"]


class FixedReader:
    def rate(self):
        return 1e10


@pytest.fixture(scope="module")
def result(peers, tmp_path_factory):
    home = tmp_path_factory.mktemp("peers")
    peers.HOME, peers.PROMPT, peers.NEW = home, 8, 4
    folder = make_qwen2(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)
    names = ["transformers-float32", "lorax-int8", "openvino-float32"]
    with Progress(disable=True) as progress:
        return peers.compete("tiny", folder, 2, names, 1, FixedReader(), progress)


def test_each_contestant_is_timed_beside_the_reference_and_absent_ones_are_named(result):
    found = result["contestants"]
    assert set(found) == {"transformers-float32", "lorax-int8"}
    assert result["missing"] == {"openvino-float32": "no environment; --setup openvino makes it"}
    assert found["transformers-float32"]["ratio"] == {"prompt": 1.0, "step": 1.0}
    seconds = [one["seconds"]["prompt"] for one in found.values()]
    assert found["lorax-int8"]["ratio"]["prompt"] == pytest.approx(seconds[0] / seconds[1])
    assert found["lorax-int8"]["versions"].keys() >= {"torch", "lorax-core"}


def test_the_limit_is_that_of_the_contestant_s_own_bits(peers, result):
    one = peers.Contestant("lorax-int8", None, 1.0, {}, {"step": [0.2], "prompt": [1.0]})
    reference = peers.Contestant("transformers-float32", None, 1.0, {}, {"step": [0.4], "prompt": [1.0]})

    row = peers.row(one, reference, 32_000, 1e6)

    assert row["ratio"]["step"] == pytest.approx(2.0)
    assert row["times_limit"] == pytest.approx(0.2 / (32_000 * 8.25 / 32 / 1e6))


def test_an_embedding_that_is_no_head_is_not_read_in_a_step(peers, tmp_path):
    tied, apart = (
        make_qwen2(tmp_path / name, vocab_size=100, tie_word_embeddings=name == "tied") for name in ("tied", "apart")
    )

    numbers = {folder: peers.bytes_of_a_step(folder) // 4 for folder in (tied, apart)}

    with safe_open(tied / "model.safetensors", framework="np") as tensors:
        whole = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118  not a dict
    assert numbers[tied] == numbers[apart] == whole


def test_a_contestant_that_fails_is_named_and_without_the_reference_nothing_is_told(peers, tmp_path):
    peers.HOME = tmp_path
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text('{"vocab_size": 100}')

    with Progress(disable=True) as progress, pytest.raises(RuntimeError, match="ended with 1; "):
        peers.compete("tiny", empty, 1, ["transformers-float32"], 1, FixedReader(), progress)


def test_results_are_shown_and_plotted(peers, result, capsys, tmp_path):
    peers.show([result])
    shown = capsys.readouterr()
    assert "lorax-int8" in shown.out
    assert "openvino-float32 took no part" in shown.err

    if importlib.util.find_spec("matplotlib") is not None:
        peers.plot([result], tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_texts_are_embedded_by_a_contestant(peers, tmp_path_factory):
    peers.HOME = tmp_path_factory.mktemp("encoders")
    folder = make_bert(tmp_path_factory.mktemp("bert"), tokenizer=False, max_position_embeddings=256)
    folder = folder.rename(folder.with_name("minilm"))
    names = ["lorax-float32"]

    with Progress(disable=True) as progress:
        result = peers.compete("minilm", folder, 256, names, 1, FixedReader(), progress)

    assert result["missing"] == {}
    assert {name: set(one["seconds"]) for name, one in result["contestants"].items()} == {
        one: {"texts"} for one in names
    }


def test_jobs_are_new_each_time_and_texts_are_short_and_long(peers):
    import random

    source = random.Random(0)
    first, second = (peers.jobs("generate", 3, 1000, source) for _ in range(2))
    texts = peers.jobs("embed", 1, 1000, source)["texts"]

    assert first["prompts"] != second["prompts"] != second["more"]
    assert [len(ids) for ids in first["prompts"]] == [peers.PROMPT] * 3
    assert min(map(len, texts)) < 12
    assert max(map(len, texts)) > 150
