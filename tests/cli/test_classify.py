"""`lorax classify` on tiny random BERTs: heads of their own, and heads that adapters bring."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import transformers as hf
from builders import BERT, change_json, make_letter_tokenizer, make_lora
from oracles import make_model

import lorax_core
from lorax_core.cli.classifications import entities_in
from lorax_core.types import Entity

TEXTS = ["Ada met Bob in Rome", "no, (yes)"]
IOB = {0: "O", 1: "B-PER", 2: "I-PER"}
TONES = {0: "glad", 1: "sad", 2: "calm"}


def make_classifier(kind, folder, labels, seed):
    model = make_model(kind, BERT, seed=seed, id2label=labels, label2id={name: at for at, name in labels.items()})
    model.save_pretrained(folder)
    make_letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Classifiers of tokens (with entities, and without) and of texts, and a base without a head with two adapters."""
    root = tmp_path_factory.mktemp("classifiers")
    base = make_model(hf.BertModel, BERT, seed=5)
    base.save_pretrained(root / "base")
    make_letter_tokenizer().save_pretrained(root / "base")
    for name, kind, task in (
        ("ner", hf.BertForTokenClassification, "TOKEN_CLS"),
        ("tone", hf.BertForSequenceClassification, "SEQ_CLS"),
    ):
        model = make_model(kind, BERT, seed=6, num_labels=3)
        model.bert.load_state_dict(base.state_dict(), strict=False)
        make_lora(model, root / f"lora-{name}", seed=7, task_type=task, target_modules=["query"])
    make_classifier(hf.BertForTokenClassification, root / "ner", IOB, seed=7)
    make_classifier(hf.BertForTokenClassification, root / "plain", TONES, seed=8)
    make_classifier(hf.BertForSequenceClassification, root / "tone", TONES, seed=3)
    return root


def classified(folder, adapter=None, **about):
    """What the Python face says of the texts."""
    with lorax_core.load(folder) as engine:
        if adapter is not None:
            engine.adapters.load("it", adapter, **about)
        return engine.classify(TEXTS, adapter="it" if adapter is not None else None)


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def labelled(line):
    return [one["label"] for one in line["labels"]]


def named(labels):
    return [word for at, name in labels.items() for word in ("--label", f"{at}={name}")]


def test_texts_have_every_label_by_falling_score(main, folders):
    code, out, err = main("classify", str(folders / "tone"), *TEXTS)

    rows = [line.split() for line in out.splitlines()]
    answers = classified(folders / "tone")
    assert (code, err) == (0, "")
    assert rows[0] == ["INDEX", "LABEL", "SCORE"]
    assert rows[1:] == [
        [str(index), label, f"{score:.4f}"]
        for index, answer in enumerate(answers)
        for label, score in zip(answer.labels, answer.scores, strict=True)
    ]


def test_entities_are_shown_where_labels_make_them(main, folders):
    _, out, _ = main("classify", str(folders / "ner"), *TEXTS)

    rows = [line.split() for line in out.splitlines()]
    found = [(index, one) for index, answer in enumerate(classified(folders / "ner")) for one in answer.entities]
    assert any(" " in one.text for _, one in found)
    assert rows[0] == ["INDEX", "LABEL", "SCORE", "TEXT", "START", "END"]
    assert rows[1:] == [
        [str(index), one.label, f"{one.score:.4f}", *one.text.split(), str(one.start), str(one.end)]
        for index, one in found
    ]


def test_tokens_are_shown_where_labels_make_no_entities(main, folders):
    _, out, _ = main("classify", str(folders / "plain"), TEXTS[0])

    rows = [line.split() for line in out.splitlines()]
    answer = classified(folders / "plain")[0]
    assert rows[0] == ["INDEX", "LABEL", "SCORE", "TOKEN", "START", "END"]
    assert [row[1] for row in rows[1:]] == answer.labels
    assert [row[3] for row in rows[1:]] == answer.tokens
    assert [(int(row[4]), int(row[5])) for row in rows[1:]] == answer.offsets


def test_a_text_in_which_nothing_is_found_is_told_on_stderr(main, folders):
    code, out, err = main("classify", str(folders / "plain"), "")

    assert (code, out.split()) == (0, ["INDEX", "LABEL", "SCORE", "TOKEN", "START", "END"])
    assert err == "text 0: nothing was found\n"


def test_json_is_a_line_for_each_text(main, folders):
    _, out, _ = main("classify", str(folders / "ner"), *TEXTS, "--json")

    for index, (line, answer) in enumerate(zip(lines(out), classified(folders / "ner"), strict=True)):
        assert (line["schema"], line["index"], line["truncated"]) == (1, index, False)
        assert line["tokens"] == answer.usage.prompt_tokens
        assert labelled(line) == answer.labels
        assert [one["score"] for one in line["labels"]] == pytest.approx(answer.scores, abs=1e-6)
        assert [one["token"] for one in line["labels"]] == answer.tokens
        assert [(one["start"], one["end"]) for one in line["labels"]] == answer.offsets
        assert [(one["label"], one["text"]) for one in line["entities"]] == [
            (one.label, one.text) for one in answer.entities
        ]


def test_json_of_texts_has_no_entities(main, folders):
    _, out, _ = main("classify", str(folders / "tone"), TEXTS[0], "--json")

    (line,) = lines(out)
    assert line["entities"] is None
    assert [sorted(one) for one in line["labels"]] == [["label", "score"]] * 3


def test_lines_of_stdin_are_texts(main, folders, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))

    _, out, _ = main("classify", str(folders / "tone"), "-", "--json")

    assert list(map(labelled, lines(out))) == [answer.labels for answer in classified(folders / "tone")]


def test_a_line_far_down_is_called_by_its_number(main, folders, monkeypatch):
    given = "\n".join([*["a"] * 300, "", "a " * 200])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))

    _, _, err = main("classify", str(folders / "plain"), "-", "--truncate", "end")

    assert err == "line 301: nothing was found\nwarning: line 302 was cut to 96 tokens\n"


@pytest.mark.parametrize("name", ["ner", "tone"])
def test_an_adapter_s_head_answers_with_the_labels_that_are_named(main, folders, name):
    labels = IOB if name == "ner" else TONES

    code, out, _ = main(
        *("classify", str(folders / "base"), *TEXTS, f"--adapter=it={folders / f'lora-{name}'}", "--json"),
        *named(labels),
    )

    expected = classified(folders / "base", folders / f"lora-{name}", id2label=labels)
    assert code == 0
    assert list(map(labelled, lines(out))) == [answer.labels for answer in expected]
    assert set(labelled(lines(out)[0])) <= set(labels.values())


def test_among_several_adapters_one_is_named_and_the_labels_are_its_own(main, folders):
    given = [f"--adapter={name}={folders / f'lora-{name}'}" for name in ("ner", "tone")]
    asked = ["classify", str(folders / "base"), TEXTS[0], *given, "--json"]

    refused, _, why = main(*asked)
    _, tones, _ = main(*asked, "--use", "tone", *named(TONES))
    _, tokens, _ = main(*asked, "--use", "ner")

    assert (refused, "--use" in why) == (2, True)
    assert sorted(labelled(lines(tones)[0])) == sorted(TONES.values())
    assert labelled(lines(tokens)[0]) == classified(folders / "base", folders / "lora-ner")[0].labels


def test_several_adapters_classify_as_their_weighted_sum(main, folders, tmp_path):
    model = make_model(hf.BertForSequenceClassification, BERT, seed=3, num_labels=3)
    given = {name: make_lora(model, tmp_path / name, seed=at, target_modules=["query"]) for at, name in enumerate("ab")}
    with lorax_core.load(folders / "tone", adapters=given) as engine:
        expected = engine.classify(TEXTS, adapter={"a": 2.0, "b": -1.5})

    _, out, _ = main(
        *("classify", str(folders / "tone"), *TEXTS, "--use", "a=2,b=-1.5", "--json"),
        *(f"--adapter={name}={folder}" for name, folder in given.items()),
    )

    scores = [one["score"] for line in lines(out) for one in line["labels"]]
    assert scores == pytest.approx([score for answer in expected for score in answer.scores], abs=1e-6)
    assert scores != pytest.approx([s for answer in classified(folders / "tone") for s in answer.scores], abs=1e-3)


def test_a_task_is_told_where_the_files_do_not_say_it(main, folders, tmp_path):
    files = ("adapter_config.json", "adapter_model.safetensors")
    for name in files:
        (tmp_path / name).write_bytes((folders / "lora-tone" / name).read_bytes())
    change_json(tmp_path / "adapter_config.json", task_type=None)
    asked = ["classify", str(folders / "base"), *TEXTS, f"--adapter=it={tmp_path}", "--json"]

    refused, _, why = main(*asked)
    code, out, _ = main(*asked, "--task", "sequence-classification")

    assert (refused, "does not say for which task" in " ".join(why.split())) == (1, True)
    assert code == 0
    assert list(map(labelled, lines(out))) == [
        answer.labels for answer in classified(folders / "base", folders / "lora-tone")
    ]


def test_problem_type_says_what_the_numbers_of_an_adapter_s_head_mean(main, folders):
    asked = ["classify", str(folders / "base"), *TEXTS, f"--adapter=it={folders / 'lora-tone'}", "--json"]

    _, out, _ = main(*asked, "--problem-type", "multi_label_classification")

    expected = classified(folders / "base", folders / "lora-tone", problem_type="multi_label_classification")
    scores = [one["score"] for line in lines(out) for one in line["labels"]]
    assert scores == pytest.approx([score for answer in expected for score in answer.scores], abs=1e-6)
    assert sum(scores) != pytest.approx(len(TEXTS), abs=1e-2)


class Screen(io.StringIO):
    """A terminal that is written to."""

    def isatty(self):
        return True


def test_at_a_terminal_entities_are_marked_in_their_texts(main, folders, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "dumb")

    code, _, _ = main("classify", str(folders / "ner"), *TEXTS)

    expected = []
    for at, (text, answer) in enumerate(zip(TEXTS, classified(folders / "ner"), strict=True)):
        for one in reversed(answer.entities):
            text = f"{text[: one.end]}[{one.label} {one.score:.2f}]{text[one.end :]}"
        expected.append(f"{at}  {text}")
    assert code == 0
    # Where lines are broken is the terminal's.
    assert screen.getvalue().split() == " ".join(expected).split()


@pytest.mark.parametrize(("given", "numbered"), [("-", True), ("Ada Lovelace", False)])
def test_at_a_terminal_a_line_is_numbered_and_a_single_text_is_not(main, folders, monkeypatch, given, numbered):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ada Lovelace")))
    monkeypatch.setenv("TERM", "dumb")

    main("classify", str(folders / "ner"), given)

    assert screen.getvalue().startswith("0  ") is numbered


def test_marks_have_a_colour_for_each_label_and_nothing_is_obeyed():
    colours = {}
    entities = [Entity(label, 0.987, "", start, end) for label, start, end in (("B", 0, 1), ("A", 2, 4), ("B", 5, 6))]

    shown = entities_in("b a\x1b b\nrest", entities, colours)

    assert shown.plain == "b[B 0.99] a\\x1b[A 0.99] b[B 0.99]\nrest"
    assert colours == {"B": "cyan", "A": "magenta"}
    assert [span.style for span in shown.spans if "bold" in str(span.style)] == [
        "bold underline cyan", "bold underline magenta", "bold underline cyan",
    ]  # fmt: skip


def test_a_file_of_texts_is_classified_into_a_file(main, folders, tmp_path):
    records, out = tmp_path / "records.jsonl", tmp_path / "labels.jsonl"
    records.write_text("".join(json.dumps({"body": text, "id": at * 10}) + "\n" for at, text in enumerate(TEXTS)))
    asked = ["classify", str(folders / "tone"), f"--file={records}", "--field=body"]

    code, nothing, err = main(*asked, f"--out={out}")
    _, shown, _ = main(*asked, "--json")

    assert (code, nothing, err.startswith("2 lines in ")) == (0, "", True)
    assert out.read_text() == shown
    assert [(one["index"], one["id"]) for one in lines(shown)] == [(0, 0), (1, 10)]
    assert list(map(labelled, lines(shown))) == [answer.labels for answer in classified(folders / "tone")]


def test_a_file_that_was_begun_names_the_options_of_the_head_that_differ(main, folders, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("a\n" * 512 + "a " * 200)
    asked = ["classify", str(folders / "base"), f"--adapter=it={folders / 'lora-tone'}", f"--file={texts}"]
    asked += [f"--out={tmp_path / 'labels.jsonl'}", *(f"--label={at}=l{at}" for at in range(3))]
    main(*asked)

    _, _, labels = main(*asked[:-1], "--label=2=other")
    _, _, others = main(*asked, "--task=sequence-classification", "--problem-type=regression")

    assert "labels.jsonl.part was begun with another --label\n" in labels
    assert "labels.jsonl.part was begun with another --task, --problem-type\n" in others


def test_a_long_text_is_refused_and_cut_when_asked(main, folders):
    long = "a " * 200

    refused, out, _ = main("classify", str(folders / "tone"), long)
    code, cut, warning = main("classify", str(folders / "tone"), long, "--truncate", "end", "--json")

    assert (refused, out) == (1, "")
    assert code == 0
    assert [(line["tokens"], line["truncated"]) for line in lines(cut)] == [(96, True)]
    assert warning == "warning: text 0 was cut to 96 tokens\n"


ADAPTER = "--adapter=it=LORA"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 1, "no head for"),
        ([ADAPTER, "--label", "glad"], 2, "'glad' is not ID=NAME"),
        ([ADAPTER, "--label", "-1=glad"], 2, "'-1=glad' is not ID=NAME"),
        ([ADAPTER, "--label", "0=glad", "--label", "0=sad"], 2, "label 0 has two names"),
        ([ADAPTER, "--label", "0=glad"], 1, "has 3 labels; id2label names [0]"),
        ([ADAPTER, "--task", "token-classification"], 1, "is for 'sequence-classification', not for"),
        ([ADAPTER, "--use", "ti"], 1, "did you mean 'it'?"),
        ([ADAPTER, "--use", "it=1,it=2"], 2, "'it' has two weights"),
        ([ADAPTER, "--use", "it=0.5", "--label", "0=glad"], 2, "the head of one adapter"),
        (["--label", "0=glad"], 2, "the head of one adapter"),
        (["--task", "token-classification"], 2, "the head of one adapter"),
        (["--problem-type", "regression"], 2, "--problem-type"),
        (["--problem-type", "regresion"], 2, "is not one of"),
        (["--out", "x.jsonl"], 2, "it needs --file"),
        (["--adapter", "it=no-such-folder"], 1, "no-such-folder"),
    ],
)
def test_what_cannot_be_classified_is_told_on_stderr(main, folders, arguments, code, told):
    words = [word.replace("LORA", str(folders / "lora-tone")) for word in arguments]

    exit_code, out, err = main("classify", str(folders / "base"), TEXTS[0], *words)

    assert (exit_code, out) == (code, "")
    assert told in " ".join(err.replace("│", " ").split())


def test_help_imports_neither_torch_nor_transformers_nor_numpy():
    code = (
        "import sys\nfrom lorax_core.cli.main import main\ntry:\n    main(['classify', '--help'])\nexcept SystemExit:\n"
        "    pass\nprint(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert "Usage: lorax classify" in done.stdout
    assert done.stderr.split() == []
