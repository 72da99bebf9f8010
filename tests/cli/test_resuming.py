"""What lies beside an output while it is written: whose files are refused, and what a state must say."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from lorax_core.cli.conversation import Conversation
from lorax_core.cli.files import job_of, refuse_same, write_answers
from lorax_core.cli.loading import Loading
from lorax_core.cli.records import Bounds, Position, RecordFile
from lorax_core.cli.resuming import NoHead, PartFile, files_mark
from lorax_core.cli.vectors import NpyHead, SafetensorsHead
from lorax_core.errors import RequestError

ROW = b"\0" * 8


def position(records):
    data = b"a\n" * records
    return Position(records, len(data), hashlib.sha256(data).hexdigest())


def interrupted(out, job=None, head=None, records=3):
    """An output that was begun, with some records in it."""
    part = PartFile(out, job or {})
    with pytest.raises(MemoryError), part.writing(head or NoHead()):
        _break_down(part, records)


def _break_down(part, records):
    if records:
        part.add(ROW * records, position(records))
    raise MemoryError("planted")


def state_of(out):
    return out.with_name(out.name + ".part.json")


@pytest.mark.parametrize("name", ["out", "out.part", "out.part.json", "out.part.json.new"])
@pytest.mark.parametrize("link", [None, os.link, os.symlink], ids=["itself", "hard link", "link"])
def test_the_input_is_not_replaced_by_what_is_written_beside_the_output(tmp_path, name, link):
    given = tmp_path / (name if link is None else "texts")
    given.write_bytes(b"a\n")
    if link is not None:
        link(given, tmp_path / name)

    with pytest.raises(RequestError, match=f"{name} is the file that is read"):
        refuse_same(RecordFile(given), tmp_path / "out")


@pytest.mark.parametrize("name", ["out", "out.part"])
def test_stdin_that_is_redirected_from_the_output_is_refused(tmp_path, monkeypatch, name):
    given = tmp_path / name
    given.write_bytes(b"a\n")

    with given.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with pytest.raises(RequestError, match=f"{name} is the file that is read"):
            refuse_same(RecordFile(Path("-")), tmp_path / "out")


def test_a_part_of_somebody_else_is_replaced_only_by_restart(tmp_path):
    out, foreign = tmp_path / "out", tmp_path / "out.part"
    foreign.write_bytes(b"precious")

    with pytest.raises(RequestError, match=r"out.part is there already, and no out.part.json says of what") as caught:
        PartFile(out, {})
    kept = foreign.read_bytes()
    with PartFile(out, {}, restart=True).writing(NoHead()):
        pass

    assert "--restart" in caught.value.hint
    assert (kept, out.read_bytes()) == (b"precious", b"")


def test_an_empty_part_without_a_state_is_of_a_process_that_was_killed_early(tmp_path):
    tmp_path.joinpath("out.part").touch()

    with PartFile(tmp_path / "out", {}).writing(NoHead()):
        pass

    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_part_has_a_state_before_it_has_bytes(tmp_path):
    out, fresh = tmp_path / "out.npy", tmp_path / "out.npy.part.json.new"
    fresh.mkdir()  # no state can be written

    with pytest.raises(RequestError, match="cannot be written"), PartFile(out, {}).writing(NpyHead(2)):
        raise AssertionError("it began")
    size = out.with_name("out.npy.part").stat().st_size
    fresh.rmdir()
    with PartFile(out, {}).writing(NpyHead(2)):
        pass

    assert size == 0


@pytest.mark.parametrize("name", ["out.part", "out.part.json"])
@pytest.mark.parametrize("restart", [False, True])
def test_links_and_folders_are_no_part(tmp_path, name, restart):
    tmp_path.joinpath("victim").write_bytes(b"precious")
    tmp_path.joinpath(name).symlink_to("victim")
    with pytest.raises(RequestError, match=f"{name}' is a link") as caught:
        PartFile(tmp_path / "out", {}, restart=restart)
    tmp_path.joinpath(name).unlink()
    tmp_path.joinpath(name).mkdir()
    with pytest.raises(RequestError, match=f"{name}' is not a regular file"):
        PartFile(tmp_path / "out", {}, restart=restart)

    assert caught.value.hint == "remove it, or give another --out"


def test_links_that_come_while_a_model_is_loaded_are_not_followed(tmp_path):
    victim, part = tmp_path / "victim", PartFile(tmp_path / "out", {})
    victim.write_bytes(b"precious")
    tmp_path.joinpath("out.part").symlink_to("victim")

    with pytest.raises(RequestError, match="out cannot be written"), part.writing(NoHead()):
        raise AssertionError("it was opened")

    assert victim.read_bytes() == b"precious"


def test_an_output_that_is_a_link_to_nothing_is_refused(tmp_path):
    out = tmp_path / "out"
    out.symlink_to("nowhere")

    with pytest.raises(RequestError, match="is a link to nowhere, which is not there"):
        PartFile(out, {}, overwrite=True)

    assert out.is_symlink()


@pytest.mark.parametrize("head", [NoHead(), NpyHead(2)], ids=["lines", "array"])
def test_a_run_that_answered_nothing_leaves_nothing(tmp_path, head):
    interrupted(tmp_path / "out", head=head, records=0)

    assert list(tmp_path.iterdir()) == []


def test_a_link_where_the_next_state_goes_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    tmp_path.joinpath("out.part.json.new").symlink_to("victim")

    interrupted(tmp_path / "out")

    assert victim.read_bytes() == b"precious"
    assert json.loads(state_of(tmp_path / "out").read_text())["records"] == 3


def test_a_link_where_a_conversation_is_written_first_is_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "talk.json"
    victim.write_bytes(b"precious")
    tmp_path.joinpath(f".talk.json.{os.getpid()}.part").symlink_to("victim")

    Conversation(turns=[("a", "b")]).save(file)

    assert victim.read_bytes() == b"precious"
    assert (len(json.loads(file.read_text())), file.is_symlink()) == (2, False)


def test_a_conversation_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()

    with pytest.raises(RequestError, match="folder cannot be written"):
        Conversation(turns=[("a", "b")]).save(tmp_path / "folder")

    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("head", [NpyHead(2), SafetensorsHead(2)], ids=["npy", "safetensors"])
@pytest.mark.parametrize("change", [{"records": 2}, {"written": 16}])
def test_a_state_whose_rows_are_not_its_bytes_is_refused(tmp_path, head, change):
    out = tmp_path / "out.npy"
    interrupted(out, head=head)
    state_of(out).write_text(json.dumps({**json.loads(state_of(out).read_text()), **change}))

    part = PartFile(out, {})
    with pytest.raises(RequestError, match=r"is damaged: .* bytes are not . rows") as caught, part.writing(head):
        raise AssertionError("it was continued")

    assert caught.value.hint == "start over: --restart"


@pytest.mark.parametrize("zero", ["records", "bytes", "written"])
def test_a_state_in_which_one_count_alone_is_zero_is_refused(tmp_path, zero):
    out = tmp_path / "out"
    interrupted(out)
    state_of(out).write_text(json.dumps({**json.loads(state_of(out).read_text()), zero: 0}))

    with pytest.raises(RequestError, match="is damaged"):
        PartFile(out, {})


def test_an_attempt_that_was_killed_before_it_answered_does_not_stop_another_one(tmp_path):
    out = tmp_path / "out"
    with PartFile(out, {"--prompt": "wrong"}).writing(NoHead()):
        left = {file: file.read_bytes() for file in tmp_path.iterdir()}
    out.unlink()
    for file, data in left.items():
        file.write_bytes(data)

    part = PartFile(out, {"--prompt": "right"})
    with part.writing(NoHead()):
        part.add(ROW, position(1))

    assert out.read_bytes() == ROW


def test_an_output_that_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    part = PartFile(out, {})

    with pytest.raises(RequestError, match="out is there already"), part.writing(NoHead()):
        out.write_bytes(b"precious")

    assert out.read_bytes() == b"precious"
    assert tmp_path.joinpath("out.part").exists()


class Engine:
    """Answers every text with itself."""

    def submit(self, texts):
        return Call(texts)


class Call:
    def __init__(self, results):
        self.results = results

    def wait(self):
        return self.results


def test_only_what_the_state_says_is_promised(tmp_path, capsys):
    given, out = RecordFile(tmp_path / "in", bounds=Bounds(records=1)), tmp_path / "out"
    given.file.write_bytes(b"a\nb\nc\nd\n")

    def encode(records, answers):
        if records[0].line == 3:
            # As on a full disk, no state can be written any more.
            tmp_path.joinpath("out.part.json.new").mkdir()
            raise MemoryError("planted")
        return ROW

    with pytest.raises(RequestError, match="out cannot be written"):
        write_answers(Engine(), given, lambda record: record.text, PartFile(out, {}), NoHead(), encode)

    assert json.loads(state_of(out).read_text())["records"] == 0
    assert "go" not in capsys.readouterr().err


@pytest.mark.parametrize("folder", [".", "0_Transformer"])
@pytest.mark.parametrize("name", ["vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "tokenizer.json"])
def test_another_vocabulary_is_another_model(tmp_path, folder, name):
    file = tmp_path / folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"one")
    before = files_mark(tmp_path)

    file.write_bytes(b"three")

    assert files_mark(tmp_path) != before


def test_what_an_output_leaves_beside_a_model_is_no_other_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = files_mark(tmp_path)

    interrupted(tmp_path / "out")

    assert state_of(tmp_path / "out").exists()
    assert files_mark(tmp_path) == before


def test_threads_are_no_other_job_and_another_field_is_one(tmp_path):
    (tmp_path / "model").mkdir()
    given, out, model = tmp_path / "in.jsonl", tmp_path / "out", str(tmp_path / "model")
    interrupted(out, job_of(Loading({"threads": 1}), model, RecordFile(given, "body")))

    same = PartFile(out, job_of(Loading({"threads": 2, "token": "secret"}), model, RecordFile(given, "body")))
    with pytest.raises(RequestError, match="was begun with another form of --file"):
        PartFile(out, job_of(Loading({"threads": 1}), model, RecordFile(given, "title")))

    assert same.position.records == 3
    assert "secret" not in state_of(out).read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "set of adapters, merged adapter"),
        ({"adapters": {"it": "lora"}}, "merged adapter"),
        ({"merge_adapter": "lora"}, "set of adapters"),
        ({"adapters": {"it": "other"}, "merge_adapter": "lora"}, "set of adapters"),
        ({"adapters": {"it": "lora"}, "merge_adapter": "other"}, "merged adapter"),
    ],
)
def test_other_adapters_are_another_job(tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "lora", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')

    def job(options):
        return job_of(Loading(options), "model", RecordFile(tmp_path / "in"))

    interrupted(tmp_path / "out", job({"adapters": {"it": "lora"}, "merge_adapter": "lora"}))

    with pytest.raises(RequestError, match=f"begun with another {named}\n"):
        PartFile(tmp_path / "out", job(options))
