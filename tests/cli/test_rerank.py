"""`lorax rerank` on a tiny random cross-encoder, and on a base with an adapter whose head has one label."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import transformers as hf
from builders import BERT, make_letter_tokenizer, make_lora
from oracles import make_model

import lorax_core

QUERY = "Who was Ada"
DOCUMENTS = ["Ada met Bob in Rome", "no, (yes)", "Rome\tis  old", "no, (yes)"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A cross-encoder, and its encoder alone with an adapter that brings a head."""
    root = tmp_path_factory.mktemp("rerankers")
    model = make_model(hf.BertForSequenceClassification, BERT, seed=3, num_labels=1)
    model.save_pretrained(root / "cross")
    model.bert.save_pretrained(root / "base")
    for name in ("cross", "base"):
        make_letter_tokenizer().save_pretrained(root / name)
    make_lora(model, root / "lora", seed=7, task_type="SEQ_CLS", target_modules=["query"])
    return root


def ranked(folder, **options):
    """What the Python face says of the documents."""
    adapters = {"it": options.pop("source")} if "source" in options else {}
    with lorax_core.load(folder, adapters=adapters) as engine:
        return engine.rerank(QUERY, DOCUMENTS, **options)


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_documents_are_shown_by_falling_score(main, folders):
    code, out, err = main("rerank", str(folders / "cross"), QUERY, *DOCUMENTS)

    rows = [line.split(maxsplit=3) for line in out.splitlines()]
    expected = ranked(folders / "cross")
    assert (code, err) == (0, "")
    assert rows[0] == ["RANK", "SCORE", "INDEX", "TEXT"]
    assert rows[1:] == [
        [str(rank), f"{one.score:.4f}", str(one.index), " ".join(DOCUMENTS[one.index].split())]
        for rank, one in enumerate(expected, 1)
    ]


def test_the_best_are_chosen_and_logits_are_shown_raw(main, folders):
    _, out, _ = main("rerank", str(folders / "cross"), QUERY, *DOCUMENTS, "--top-n=3", "--raw", "--json")

    expected = ranked(folders / "cross", top_n=3, normalize=False)
    found = lines(out)
    assert [(one["schema"], one["rank"], one["index"], one["text"]) for one in found] == [
        (1, rank, one.index, DOCUMENTS[one.index]) for rank, one in enumerate(expected, 1)
    ]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in expected], abs=1e-6)


def test_the_best_is_chosen_wherever_it_stands(main, folders, tmp_path):
    worst_first = [DOCUMENTS[one.index] for one in reversed(ranked(folders / "cross"))]
    file = tmp_path / "documents.txt"
    file.write_text("\n".join([*[worst_first[0]] * 600, worst_first[-1]]))

    _, given, _ = main("rerank", str(folders / "cross"), QUERY, *worst_first[1:], "--top-n=1", "--json")
    _, read, _ = main("rerank", str(folders / "cross"), QUERY, f"--file={file}", "--top-n=1", "--json")

    assert [one["text"] for one in lines(given) + lines(read)] == [worst_first[-1]] * 2
    assert lines(read)[0]["index"] == 600


def test_documents_come_from_stdin_and_from_files(main, folders, monkeypatch, tmp_path):
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": f"n{at}"}) + "\n" for at, text in enumerate(DOCUMENTS)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(DOCUMENTS).encode())))

    _, piped, _ = main("rerank", str(folders / "cross"), QUERY, "-", "--json")
    _, read, _ = main("rerank", str(folders / "cross"), QUERY, f"--file={file}", "--json")

    expected = [one.index for one in ranked(folders / "cross")]
    assert [one["index"] for one in lines(piped)] == expected
    assert [(one["index"], one["id"], one["text"]) for one in lines(read)] == [
        (at, f"n{at}", DOCUMENTS[at]) for at in expected
    ]


def test_an_adapter_s_head_ranks(main, folders):
    _, out, _ = main("rerank", str(folders / "base"), QUERY, *DOCUMENTS, f"--adapter=it={folders / 'lora'}", "--json")

    expected = ranked(folders / "base", source=folders / "lora", adapter="it")
    assert [one["score"] for one in lines(out)] == pytest.approx([one.score for one in expected], abs=1e-6)


def test_a_long_pair_is_refused_by_its_text_and_cut_when_asked(main, folders):
    refused, out, why = main("rerank", str(folders / "cross"), QUERY, "b", "a " * 200)
    code, cut, warning = main("rerank", str(folders / "cross"), QUERY, "b", "a " * 200, "--truncate=end", "--json")

    assert (refused, out, "error: text 1: " in why) == (1, "", True)
    assert (code, len(lines(cut))) == (0, 2)
    assert warning == "warning: text 1 was cut to 96 tokens\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "give a DOCUMENT or several"),
        (["a", "--file=x"], 2, "give a DOCUMENT or several"),
        (["a", "--field=x"], 2, "it needs --file"),
        (["a", "--top-n=0"], 2, "top-n"),
        (["--file=no-such-file"], 1, "no-such-file cannot be read"),
        (["a", "--use=it"], 1, "--adapter it=FOLDER"),
    ],
)
def test_what_cannot_be_ranked_is_told_before_anything_is_loaded(main, arguments, code, told):
    exit_code, out, err = main("rerank", "no-such-folder", QUERY, *arguments)

    assert (exit_code, out) == (code, "")
    assert told in " ".join(err.replace("│", " ").split())


def test_help_imports_neither_torch_nor_transformers_nor_numpy():
    code = (
        "import sys\nfrom lorax_core.cli.main import main\ntry:\n    main(['rerank', '--help'])\nexcept SystemExit:\n"
        "    pass\nprint(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert "Usage: lorax rerank" in done.stdout
    assert done.stderr.split() == []
