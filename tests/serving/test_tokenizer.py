"""Tokenizers of anybody: their code never runs, their files are files, and their numbers are numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from builders import change_json, make_bert, make_byte_tokenizer, make_qwen2
from rigs import within

from lorax_core.errors import CheckpointError, RequestError
from lorax_core.serving.text import TextFront
from lorax_core.serving.tokenizer import load_tokenizer
from lorax_core.types import Task
from lorax_core.weights.checkpoint import Checkpoint

LIMIT = 120  # seconds: for a file that never ends
CODE = """
import pathlib
pathlib.Path(__file__).with_name("it-ran").touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
class OwnConfig(PretrainedConfig):
    model_type = "qwen2"
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_qwen2(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "checkpoint")


def load(folder):
    return within(LIMIT, lambda: load_tokenizer(folder, Checkpoint(folder).config))


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder) in caught.value.message
    assert caught.value.hint
    return caught.value


OWN_CODE = {
    "a class of its own": (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}},
        {"model_type": "unknown_to_all"},
    ),
    "the old form": (
        {"tokenizer_class": "Own", "auto_map": ["own.Own", "own.Own"]},
        {"model_type": "unknown_to_all"},
    ),
    "a model of its own too": (
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        {"model_type": "unknown_to_all", "auto_map": {"AutoConfig": "own.OwnConfig"}},
    ),
    "no class, and an automatic one": (
        {"tokenizer_class": None, "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        {"model_type": "unknown_to_all"},
    ),
}
ELSEWHERE = {
    "an automatic class": ({"tokenizer_class": "AutoTokenizer"}, {}),
    "a model": ({"tokenizer_class": "AutoModelForCausalLM"}, {"auto_map": {"AutoConfig": "own.OwnConfig"}}),
    "a model of the configuration": (
        {"tokenizer_class": None},
        {"tokenizer_class": "AutoModel", "model_type": "unknown_to_all", "auto_map": {"AutoConfig": "own.OwnConfig"}},
    ),
    "a function": ({"tokenizer_class": "pipeline"}, {}),
    "a module": ({"tokenizer_class": "utils"}, {}),
    "a number": ({"tokenizer_class": 5}, {}),
    "a list": ({"tokenizer_class": ["Qwen2Tokenizer"]}, {}),
    "a path": ({"tokenizer_class": "../own.Own"}, {}),
}


def plant(folder, tokenizer, config):
    (folder / "own.py").write_text(CODE)
    change_json(folder / "tokenizer_config.json", **tokenizer)
    change_json(folder / "config.json", **config)
    return folder


@pytest.mark.parametrize("case", OWN_CODE)
def test_a_tokenizer_of_its_own_code_is_refused_as_such(folder, case):
    error = refusal(plant(folder, *OWN_CODE[case]))

    assert "code of the checkpoint's own" in error.message
    assert "own.Own" in error.message
    assert "tokenizer.json" in error.hint
    assert not (folder / "it-ran").exists()


def test_code_that_transformers_itself_passes_over_is_passed_over(folder):
    # Of Qwen2 it knows that checkpoints name wrong classes, and reads tokenizer.json.
    plant(folder, {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}, {})

    assert load(folder)("the tin")["input_ids"] == make_byte_tokenizer()("the tin")["input_ids"]
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize("case", ELSEWHERE)
def test_a_tokenizer_class_that_is_none_is_refused(folder, case):
    error = refusal(plant(folder, *ELSEWHERE[case]))

    assert "tokenizer" in error.message
    assert not (folder / "it-ran").exists()


def test_nothing_is_run_and_nobody_is_asked_where_somebody_would_say_yes(plain, tmp_path):
    folders = []
    for name, change in {**OWN_CODE, **ELSEWHERE}.items():
        folders.append(plant(shutil.copytree(plain, tmp_path / name.replace(" ", "-")), *change))
    program = (
        "import sys\nfrom pathlib import Path\nfrom lorax_core.errors import LoraxError\n"
        "from lorax_core.weights.checkpoint import Checkpoint\n"
        "from lorax_core.serving.tokenizer import load_tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n        load_tokenizer(Path(folder), Checkpoint(folder).config)\n"
        "    except LoraxError:\n        print('refused')\n"
        "print(len(sys.stdin.read()))\n"
    )

    # A hub that refuses every connection, for what would be looked up there.
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, folders)],
        input="y\n" * 100,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )

    assert done.stdout.split() == ["refused"] * len(folders) + ["200"], done.stderr
    assert not list(tmp_path.glob("**/it-ran"))


def test_a_model_type_that_transformers_does_not_know_keeps_its_tokenizer(folder):
    expected = make_byte_tokenizer()("the tin é")["input_ids"]
    change_json(folder / "config.json", model_type="known_to_a_plugin_alone")

    assert load(folder)("the tin é")["input_ids"] == expected


def test_code_for_the_model_alone_does_not_concern_the_tokenizer(folder):
    plant(folder, {}, {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}})
    change_json(folder / "config.json", model_type="known_to_a_plugin_alone")

    assert load(folder)("the tin")["input_ids"] == make_byte_tokenizer()("the tin")["input_ids"]
    assert not (folder / "it-ran").exists()


FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.txt"]


@pytest.mark.parametrize("name", FILES)
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)

    assert "is not a regular file" in refusal(folder).message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("target", ["gone.json", None])
def test_a_link_that_leads_nowhere_is_an_error_and_not_a_missing_tokenizer(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target or name)

    assert name in refusal(folder).message


def test_a_folder_in_place_of_the_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()

    assert "is not a regular file" in refusal(folder).message


def test_a_linked_tokenizer_is_read(folder, tmp_path):
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")

    assert load(folder)("the")["input_ids"] == make_byte_tokenizer()("the")["input_ids"]


def test_a_huge_file_is_refused_before_it_is_read(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**30)

    assert "1,073,741,824 bytes" in refusal(folder).message


@pytest.mark.parametrize("value", [-1, 0, float("nan"), float("-inf"), "512", True, [512], {"a": 1}])
def test_a_length_that_is_none_is_refused(folder, value):
    change_json(folder / "tokenizer_config.json", model_max_length=value)

    assert "model_max_length" in refusal(folder).message or "cannot be read" in refusal(folder).message


@pytest.mark.parametrize(("value", "limit"), [(77, 77), (77.0, 77), (10**30, None), (1e30, None), (float("inf"), None)])
def test_a_length_limits_texts_where_it_is_one(folder, value, limit):
    change_json(folder / "tokenizer_config.json", model_max_length=value)

    assert TextFront(load(folder)).max_tokens == limit


@pytest.mark.parametrize("value", [5, True, ["a"], {"default": 5}])
def test_a_chat_template_that_is_no_text_is_refused(folder, value):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", chat_template=value)

    refusal(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "5"),
        ("tokenizer_config.json", '{"model_max_length": ' + "9" * 5000 + "}"),
        ("tokenizer_config.json", "[" * 5000 + "]" * 5000),
        ("tokenizer_config.json", '{"eos_token": "\\ud800"}'),
        ("tokenizer_config.json", '{"auto_map": 5}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"version": ' + "9" * 5000 + "}"),
        ("tokenizer.json", "\0"),
    ],
)
def test_files_of_the_wrong_content_are_refused(folder, file, content):
    (folder / file).write_text(content)

    try:
        found = load(folder)("the")["input_ids"]
    except CheckpointError as error:
        found = error.message

    # Some of it transformers has no use for, such as an auto_map that is none.
    assert found == make_byte_tokenizer()("the")["input_ids"] or str(folder) in found


def test_a_regular_expression_that_gives_up_is_an_error_of_the_request(folder):
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    change_json(
        folder / "config.json", model_type="known_to_a_plugin_alone"
    )  # transformers replaces Qwen2's expression
    front = TextFront(load(folder))

    with pytest.raises(RequestError, match="the tokenizer cannot read 'aaaa"):
        within(LIMIT, lambda: front.encode("a" * 64 + "b", Task.GENERATE))


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_sequence(kind, steps):
    return {"type": "Sequence", kind: steps}


DOUBLED = [replaced({"String": "a"}, "aa")] * 40
MANY = {
    "special tokens": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 1_000
                + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
                + [{"SpecialToken": {"id": "x", "type_id": 0}}] * 1_000,
                "special_tokens": {"x": {"id": "x", "ids": [1] * 1_000, "tokens": ["x"] * 1_000}},
            }
        },
        "adds 1,000,000 special tokens",
    ),
    "a normalizer that doubles": ({"normalizer": in_sequence("normalizers", DOUBLED)}, "1,099,511,627,776 times"),
    "a normalizer in a normalizer": (
        {"normalizer": in_sequence("normalizers", [in_sequence("normalizers", DOUBLED[:20])] * 2)},
        "1,099,511,627,776 times",
    ),
    "a long replacement": ({"normalizer": replaced({"Regex": "."}, "b" * 1_000)}, "1,000 times"),
    "a decoder that doubles": ({"decoder": in_sequence("decoders", DOUBLED)}, "the decoder of the tokenizer"),
}


@pytest.mark.parametrize("case", MANY)
def test_a_tokenizer_that_multiplies_its_input_is_refused(tmp_path, case):
    changes, told = MANY[case]
    folder = make_bert(tmp_path)
    change_json(folder / "tokenizer.json", **changes)
    change_json(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")

    assert told in refusal(folder).message


def test_what_tokenizers_in_use_replace_is_read(tmp_path):
    folder = make_bert(tmp_path)
    steps = [{"type": "NFKC"}, replaced({"String": " "}, "▁"), replaced({"Regex": " {2,}"}, "▁"), {"type": "Lowercase"}]
    change_json(folder / "tokenizer.json", normalizer=in_sequence("normalizers", steps))
    change_json(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")

    assert load(folder)("abc")["input_ids"]
