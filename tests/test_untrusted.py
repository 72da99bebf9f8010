"""The gate for files of others: what it refuses, and that nothing but the error asked for comes out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lorax_core.errors import AdapterError, CheckpointError
from lorax_core.patterns import LENGTH, UntrustedPattern
from lorax_core.untrusted import (
    JSON_BYTES,
    JSON_DEPTH,
    JSON_VALUES,
    file_in,
    guarded,
    is_number,
    read_json,
    regular,
    unusable,
)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "..", "a\\..\\b", 5, None])
def test_a_name_that_leaves_its_folder_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(CheckpointError, match="names the file"):
        file_in(tmp_path, name, CheckpointError)


def test_a_name_inside_is_a_path(tmp_path: Path) -> None:
    assert file_in(tmp_path, "1_Pooling/config.json", CheckpointError) == tmp_path / "1_Pooling/config.json"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not JSON: .* in line 1, column 2"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (JSON_DEPTH + 1) + b"]" * (JSON_DEPTH + 1), f"nested more than {JSON_DEPTH} levels"),
        (b'{"a": ["\\ud800"]}', "not valid Unicode"),
        (b'{"\\udfff": 1}', "not valid Unicode"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_json_that_cannot_be_used_is_the_error_asked_for(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=says) as raised:
        read_json(file, AdapterError)
    assert str(file) in str(raised.value)
    assert raised.value.hint


def test_a_value_that_is_there_many_times_is_refused_before_it_is_looked_at_as_often() -> None:
    value: object = "x"
    for _ in range(40):  # 2 to the power of 40 strings, in 40 lists
        value = [value, value]
    assert unusable(value) == f"holds more than {JSON_VALUES:,} values"
    assert unusable(["x"] * 1000) is None


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with file.open("wb") as opened:
        opened.truncate(JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="at most 67,108,864 are read"):
        read_json(file, CheckpointError)


def test_a_pipe_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_json(tmp_path / "config.json", CheckpointError)


def test_a_link_counts_as_what_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text(json.dumps({"a": [1]}), encoding="utf-8")
    (tmp_path / "config.json").symlink_to("blob")
    assert read_json(tmp_path / "config.json", CheckpointError) == {"a": [1]}
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be read"):
        regular(tmp_path / "loop", CheckpointError)


def test_deep_json_within_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[" * (JSON_DEPTH - 1) + "]" * (JSON_DEPTH - 1), encoding="utf-8")
    assert read_json(file, CheckpointError)


def test_whatever_is_raised_inside_becomes_one_error() -> None:
    with (
        pytest.raises(AdapterError, match="reading x: KeyError: 'y'") as raised,
        guarded(AdapterError, "reading x", "z"),
    ):
        {}["y"]
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.value.hint == "z"
    with pytest.raises(CheckpointError, match=r"^own$"), guarded(AdapterError, "reading x"):
        raise CheckpointError("own")


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("(", "not supported as a regular expression"),
        ("a{1000}{1000}", "not supported as a regular expression"),
        ("(?!x)q", r"\(\?!"),
        (r"(a)\1", "not supported as a regular expression"),
        ("\ud800", "not supported as a regular expression"),
        (r"[\pL\pN]{200}", "pattern too large"),  # more than 1 MiB when it is compiled
        ("a" * (LENGTH + 1), "at most 4,000 are read"),
    ],
)
def test_an_expression_that_cannot_be_matched_is_refused(expression: str, says: str) -> None:
    with pytest.raises(AdapterError, match=says) as raised:
        UntrustedPattern(expression, "alpha_pattern of f", AdapterError)
    assert "alpha_pattern of f" in raised.value.message
    assert raised.value.hint


def test_an_expression_that_backtracks_elsewhere_matches_at_once() -> None:
    # In Python's `re` this one takes 2 to the power of 5,000 steps.
    assert not UntrustedPattern("(a|a)*b", "p", AdapterError).fullmatch("a" * 5_000)
    assert UntrustedPattern(r".*\.(q|v)_proj", "p", AdapterError).fullmatch("model.layers.0.self_attn.q_proj")


def test_numbers_are_finite_and_no_truth_values() -> None:
    nothing = [True, False, None, "1", float("nan"), float("-inf"), 10**400, [1], 1j]
    assert [is_number(value) for value in nothing] == [False] * len(nothing)
    assert all(is_number(value) for value in (0, -1, 1.5, 10**300))


@pytest.mark.parametrize("leaf", [1, 0.5, "text", None, True], ids=repr)
def test_lists_of_whatever_are_nested_as_deep_as_others(leaf):
    assert unusable([leaf] * 3) is None
    assert unusable(_nested(leaf, JSON_DEPTH - 1)) is None
    assert unusable(_nested(leaf, JSON_DEPTH)) == f"is nested more than {JSON_DEPTH} levels deep"


def _nested(leaf, depth):
    for _ in range(depth):
        leaf = [leaf]
    return leaf


class Lies(list):
    def __len__(self):
        return 0


def test_a_list_that_lies_about_its_length_is_counted():
    assert unusable(Lies([1] * (JSON_VALUES + 1))) == f"holds more than {JSON_VALUES:,} values"
