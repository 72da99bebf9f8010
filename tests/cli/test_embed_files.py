"""`lorax embed --file --out` and `--similarity` on a tiny random BERT and on the small checkpoint that the repository ships."""

from __future__ import annotations

import json

import numpy as np
import pytest
from builders import make_bert
from safetensors.numpy import load_file

import lorax_core

LINES = [f"The file {'of names ' * (at % 7)}{at}" for at in range(1300)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_bert(tmp_path_factory.mktemp("bert") / "model", seed=3))


@pytest.fixture(scope="module")
def vectors(model):
    """Of all lines, by the Python interface."""
    with lorax_core.load(model) as engine:
        return engine.embed(LINES)


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{line}\n" for line in LINES))
    return file


def test_vectors_of_a_file_are_those_of_the_python_interface(main, model, texts, vectors, tmp_path):
    npy, tensors = tmp_path / "v.npy", tmp_path / "v.safetensors"

    code, out, err = main("embed", model, f"--file={texts}", f"--out={npy}")
    main("embed", model, f"--file={texts}", f"--out={tensors}")

    assert (code, out) == (0, "")
    assert err.startswith("1,300 lines in ")
    assert err.endswith(f" a second: {npy}\n")
    np.testing.assert_array_equal(np.load(npy), vectors)
    np.testing.assert_array_equal(load_file(tensors)["embeddings"], vectors)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["texts.txt", "v.npy", "v.safetensors"]


def test_lines_of_json_keep_index_and_id(main, model, vectors, tmp_path):
    records, out = tmp_path / "records.jsonl", tmp_path / "v.jsonl"
    records.write_text("".join(json.dumps({"body": text, "id": f"n{at}"}) + "\n" for at, text in enumerate(LINES[:3])))

    main("embed", model, f"--file={records}", "--field=body", f"--out={out}")
    _, shown, _ = main("embed", model, f"--file={records}", "--field=body", "--json")

    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert shown == out.read_text()
    assert [(one["schema"], one["index"], one["id"]) for one in found] == [(1, 0, "n0"), (1, 1, "n1"), (1, 2, "n2")]
    np.testing.assert_array_equal(np.array([one["vector"] for one in found], np.float32), vectors[:3])


def test_a_line_that_cannot_be_embedded_is_mended_and_the_rest_is_done(main, model, texts, vectors, tmp_path):
    out = tmp_path / "v.npy"
    command = ["embed", model, f"--file={texts}", f"--out={out}"]
    texts.write_text("".join(f"{line if at != 1200 else 'long ' * 200}\n" for at, line in enumerate(LINES)))

    code, _, refused = main(*command)
    mended = texts.write_text("".join(f"{line}\n" for line in LINES))
    _, _, told = main(*command)

    assert mended
    assert code == 1
    assert refused.startswith("1,024 lines are done; the same command line goes on from there\nerror: line 1201 of ")
    assert told.startswith(f"{out} is continued at line 1,025 of {texts}\n276 lines in ")
    np.testing.assert_array_equal(np.load(out), vectors)


def test_lines_of_all_windows_are_numbered_and_those_that_were_cut_are_counted(main, model, texts, tmp_path):
    cut = (0, 1, 520, 521, 1100)
    texts.write_text("".join(f"{'long ' * 200 if at in cut else 'a'}\n" for at in range(1200)))

    _, shown, warned = main("embed", model, f"--file={texts}", "--truncate=end", "--json")
    _, _, counted = main("embed", model, f"--file={texts}", "--truncate=end", f"--out={tmp_path / 'v.npy'}")

    assert [json.loads(line)["index"] for line in shown.splitlines()] == [*range(1200)]
    assert [line.split()[2] for line in warned.splitlines()] == [str(at + 1) for at in cut]
    assert f"warning: too long and cut: line 1, 2, 521 and 2 more of {texts}" in counted


def test_other_options_or_another_model_do_not_continue_it(main, model, texts, tmp_path):
    command = ["embed", model, f"--file={texts}", f"--out={tmp_path / 'v.npy'}"]
    texts.write_text("".join(f"{line}\n" for line in LINES) + "long " * 200 + "\n")
    main(*command)
    copy = make_bert(tmp_path / "copy", seed=4)

    _, _, by_options = main(*command, "--prompt=query: ", "--truncate=end")
    _, _, by_model = main("embed", str(copy), *command[2:])
    code, _, anew = main(*command, "--truncate=end", "--restart")

    assert "v.npy.part was begun with another --truncate, --prompt\n" in by_options
    assert "v.npy.part was begun with another model\n" in by_model
    assert (code, "warning: too long and cut: line 1301 of " in anew) == (0, True)
    assert np.load(tmp_path / "v.npy").shape == (1301, 64)


def test_rows_of_tokens_go_into_lines_alone(main, model, texts, tmp_path):
    texts.write_text("the file\na\n")

    _, out, _ = main("embed", model, f"--file={texts}", "--pooling=none", "--json")
    code, _, err = main("embed", model, f"--file={texts}", "--pooling=none", f"--out={tmp_path / 'v.npy'}")

    with lorax_core.load(model) as engine:
        expected = engine.embed(["the file", "a"], pooling="none")
    for line, rows in zip(out.splitlines(), expected, strict=True):
        found = json.loads(line)
        np.testing.assert_array_equal(np.array(found["vector"], np.float32), rows)
        assert (found["dim"], found["tokens"]) == (rows.shape[1], rows.shape[0])
    assert (code, "--out FILE.jsonl writes them" in " ".join(err.replace("│", " ").split())) == (2, True)


def test_options_of_a_request_reach_the_vectors(main, model):
    def vector(*options):
        _, out, _ = main("embed", model, "the file", *options, "--json")
        return np.array(json.loads(out)["vector"], np.float32)

    with lorax_core.load(model) as engine:
        for options, expected in (
            (["--normalize"], engine.embed("the file", normalize=True)),
            (["--no-normalize"], engine.embed("the file", normalize=False)),
            (["--prompt", "query: "], engine.embed("the file", prompt="query: ")),
        ):
            np.testing.assert_array_equal(vector(*options), expected)


def test_an_empty_file_gives_no_vectors(main, model, texts, tmp_path):
    texts.write_text("")

    code, _, _ = main("embed", model, f"--file={texts}", f"--out={tmp_path / 'v.npy'}")

    assert code == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 64)


def test_similarity_is_the_cosine_of_each_two(main, model):
    words = ["the file", "a name", "the file"]

    _, table, _ = main("embed", model, *words, "--similarity")
    _, out, _ = main("embed", model, *words, "--similarity", "--json")

    with lorax_core.load(model) as engine:
        found = engine.embed(words, normalize=True)
    expected = found @ found.T
    np.testing.assert_allclose(json.loads(out)["similarity"], expected, atol=1e-5)
    rows = [line.split() for line in table.splitlines()]
    assert rows[0] == ["0", "1", "2"]
    assert rows[1:] == [[str(at), *(f"{value:.3f}" for value in row)] for at, row in enumerate(expected)]


def test_similarity_is_for_few_texts(main, model):
    code, out, err = main("embed", model, *LINES[:33], "--similarity")

    assert (code, out) == (1, "")
    assert "at most 32 texts" in err
    assert "--out vectors.npy" in err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give texts, a single - for lines of stdin, or --file FILE"),
        (["text", "--file=texts.txt"], "give texts, a single -"),
        (["text", "--out=v.npy"], "--file - reads lines of stdin"),
        (["text", "--field=body"], "it needs --file FILE"),
        (["--file=texts.txt", "--out=v.csv"], "'v.csv' ends in none of '.npy', '.safetensors', '.jsonl'"),
        (["--file=texts.txt", "--out=v.npy", "--json"], "--out v.jsonl writes JSON"),
        (["--file=texts.txt", "--similarity"], "it compares the vectors of texts that are given one by one"),
        (["text", "--pooling=none"], "--json shows them"),
        (["--file=texts.txt", "--restart"], "it is about the file that --out names"),
    ],
)
def test_options_that_say_nothing_together_are_a_wrong_command_line(main, arguments, told):
    code, _, err = main("embed", "no-such-folder", *arguments)

    assert code == 2
    assert told in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("ending", ["", ".part", ".part.json"])
def test_the_input_is_not_replaced(main, model, texts, tmp_path, ending):
    out = tmp_path / "v.jsonl"
    other = texts.rename(f"{out}{ending}")

    code, _, err = main("embed", model, f"--file={other}", "--field=text", f"--out={out}", "--overwrite", "--restart")

    assert (code, "is the file that is read" in err) == (1, True)
    assert other.read_text().startswith("The file 0\n")


def test_dimensions_are_those_of_the_head(main, model, texts, tmp_path):
    texts.write_text("the file\na\n")

    code, _, _ = main("embed", model, f"--file={texts}", "--dimensions=8", f"--out={tmp_path / 'v.npy'}")

    with lorax_core.load(model) as engine:
        expected = engine.embed(["the file", "a"], dimensions=8)
    assert code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)
