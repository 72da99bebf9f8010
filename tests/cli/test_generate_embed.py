"""`lorax generate` and `lorax embed` on the small checkpoint that the repository ships."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lorax_core
from lorax_core.cli import sampling

QWEN2 = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
MODEL = str(QWEN2 / "model")
PROMPT = "If the file does not exist"
ADAPTERS = {name: QWEN2 / "adapters" / name for name in ("upper", "bullets")}
GIVEN = {name: f"--adapter={name}={folder}" for name, folder in ADAPTERS.items()}


@pytest.fixture(scope="module")
def engine():
    with lorax_core.load(MODEL, adapters=ADAPTERS) as engine:
        yield engine


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_the_text_is_all_that_stdout_gets(main, engine):
    code, out, err = main("generate", MODEL, PROMPT, "--max-tokens", "24")

    assert code == 0
    assert out == engine.generate(PROMPT, max_tokens=24).text + "\n"
    assert err.startswith("24 tokens in ")
    assert err.endswith("ended by: length\n")


def test_a_dash_reads_the_prompt_from_stdin_without_its_last_line_break(main, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((PROMPT + "\n").encode())))

    _, out, _ = main("generate", MODEL, "-", "--max-tokens", "8")

    assert out == engine.generate(PROMPT, max_tokens=8).text + "\n"


def test_an_adapter_that_is_given_alone_answers(main, engine):
    _, out, _ = main("generate", MODEL, PROMPT, GIVEN["upper"], "--max-tokens", "24")

    assert out == engine.generate(PROMPT, adapter="upper", max_tokens=24).text + "\n"
    assert out.isupper()


def test_an_adapter_that_is_merged_answers_without_being_named(main, engine):
    _, out, _ = main("generate", MODEL, PROMPT, f"--merge-adapter={ADAPTERS['upper']}", "--max-tokens", "24")

    assert out == engine.generate(PROMPT, adapter="upper", max_tokens=24).text + "\n"


def test_among_several_adapters_one_is_named(main, engine):
    asked = ["generate", MODEL, PROMPT, *GIVEN.values(), "--max-tokens", "24"]

    refused, _, why = main(*asked)
    _, out, _ = main(*asked, "--use", "bullets")

    assert refused == 2
    assert "--use" in why
    assert out == engine.generate(PROMPT, adapter="bullets", max_tokens=24).text + "\n"


def test_several_adapters_answer_as_their_weighted_sum(main, engine):
    asked = ["generate", MODEL, PROMPT, *GIVEN.values(), "--max-tokens", "24"]

    _, out, _ = main(*asked, "--use", "upper=0.4,bullets=0.8")
    refused, _, why = main(*asked, "--use", "upper=half")

    assert out == engine.generate(PROMPT, adapter={"upper": 0.4, "bullets": 0.8}, max_tokens=24).text + "\n"
    assert (refused, "'upper=half' is not NAME=WEIGHT" in why) == (2, True)


def test_json_has_the_whole_answer(main, engine):
    code, out, err = main("generate", MODEL, PROMPT, GIVEN["upper"], "--max-tokens", "8", "--json")

    expected = engine.generate(PROMPT, adapter="upper", max_tokens=8)
    prompt_tokens = expected.usage.prompt_tokens
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "schema": 1,
        "model": MODEL,
        "adapter": "upper",
        "text": expected.text,
        "token_ids": expected.token_ids,
        "finish_reason": "length",
        "stop_reason": None,
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 8, "total_tokens": prompt_tokens + 8},
    }


def test_sampling_options_reach_the_engine(main, engine):
    options = {"max_tokens": 24, "temperature": 0.9, "seed": 7, "stop": [" the", "."]}

    _, out, _ = main(
        *("generate", MODEL, PROMPT, "--max-tokens", "24", "--temperature", "0.9", "--seed", "7"),
        *("--stop", " the", "--stop", "."),
    )

    assert out == engine.generate(PROMPT, **options).text + "\n"


SAMPLED = "--temperature=0.9 --top-k=20 --top-p=0.95 --min-p=0.01 --typical-p=0.9 --seed=0 --repetition-penalty=1.3"
LOWERED = "--presence-penalty=0.5 --frequency-penalty=-0.5 --logit-bias=12=-100 --logit-bias=5=2.5"
ENDED = "--min-tokens=12 --ignore-eos --stop-token-id=262 --stop-token-id=3"
FLAGS = {
    f"{SAMPLED} {LOWERED} {ENDED}": {
        "temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9, "seed": 0,
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {12: -100.0, 5: 2.5}, "min_tokens": 12, "ignore_eos": True, "stop_token_ids": [262, 3],
    },
    "--choice=yes --choice=no": {"choice": ["yes", "no"]},
    "--regex=[0-9]{4}": {"regex": "[0-9]{4}"},
    """--schema={"enum":["yes"]}""": {"json_schema": {"enum": ["yes"]}},
}  # fmt: skip


def test_each_flag_is_an_option_of_that_name_and_zero_is_said():
    given = {name: [1] if "list" in str(kind) else 0 for name, kind in sampling.FLAGS.items()}
    given |= {"logit_bias": ["7=-1.5"], "stop": ["a"], "choice": ["b"], "schema": "{}", "regex": "c"}

    found = sampling.request_options(given)

    named = {"stop_token_id": "stop_token_ids", "schema": "json_schema"}
    assert set(found) == {named.get(name, name) for name in sampling.FLAGS}
    assert set(found) <= set(lorax_core.GenerateRequest.model_fields)
    assert {name for name, value in found.items() if value == 0} == {
        name for name, value in given.items() if value == 0
    }
    assert (found["logit_bias"], found["stop_token_ids"], found["choice"]) == ({7: -1.5}, [1], ["b"])
    assert sampling.request_options(dict.fromkeys(sampling.FLAGS)) == {}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_reach_the_engine(main, engine, flags):
    _, out, _ = main("generate", MODEL, PROMPT, "--max-tokens=16", *flags.split())

    expected = engine.generate(PROMPT, max_tokens=16, **FLAGS[flags]).text
    assert out == expected + "\n"
    assert expected != engine.generate(PROMPT, max_tokens=16).text


def test_a_schema_may_be_in_a_file(main, tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": ["from the file"]}')

    _, out, _ = main("generate", MODEL, PROMPT, "--schema", str(tmp_path / "schema.json"))
    code, _, err = main("generate", MODEL, PROMPT, "--schema", str(tmp_path / "schemas.json"))

    assert out == '"from the file"\n'
    assert (code, "--schema: " in err, "JSON that begins with {" in " ".join(err.split())) == (1, True, True)


def test_several_answers_are_below_headings_and_in_json_beside_the_first(main, engine):
    asked = ["generate", MODEL, PROMPT, "--max-tokens=6", "--n=2", "--temperature=0.9", "--seed=3"]

    _, out, err = main(*asked)
    _, shown, _ = main(*asked, "--json", "--logprobs=2")

    first = engine.generate(PROMPT, max_tokens=6, n=2, temperature=0.9, seed=3, logprobs=2)
    (second,) = first.alternatives
    assert out == f"==> answer 1 <==\n{first.text}\n==> answer 2 <==\n{second.text}\n"
    assert err.startswith("12 tokens in ")
    found = json.loads(shown)
    assert (found["text"], found["alternatives"][0]["text"]) == (first.text, second.text)
    assert "".join(one["token"] for one in found["logprobs"]) == first.text
    for one, expected in zip(found["logprobs"], first.logprobs, strict=True):
        assert one["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
        assert [top["token_id"] for top in one["top"]] == list(expected.top)


def test_each_line_of_a_file_is_continued(main, engine, tmp_path):
    prompts, texts, records = tmp_path / "prompts.txt", tmp_path / "answers.txt", tmp_path / "answers.jsonl"
    asked = ["The list of files", PROMPT, "The module " * 250, "An iterator"]
    prompts.write_text("".join(f"{text}\n" for text in asked))
    room = engine.info().max_tokens - engine.count_tokens(asked[2])
    answers = [
        engine.generate(text, max_tokens=most).text for text, most in zip(asked, (128, 128, room, 128), strict=True)
    ]
    assert room < 128

    _, shown, _ = main("generate", MODEL, f"--file={prompts}")
    code, nothing, err = main("generate", MODEL, f"--file={prompts}", f"--out={texts}")
    main("generate", MODEL, f"--file={prompts}", f"--out={records}", "--logprobs=0", GIVEN["upper"], "--max-tokens=4")

    assert shown == "".join(f"==> line {line} <==\n{text}\n" for line, text in enumerate(answers, 1))
    assert texts.read_text() == shown
    assert (code, nothing, err.startswith("4 lines in ")) == (0, "", True)
    upper = engine.generate(asked, adapter="upper", max_tokens=4)
    assert [(one["index"], one["text"]) for one in lines(records.read_text())] == [
        (at, one.text) for at, one in enumerate(upper)
    ]


def test_a_line_of_a_file_that_has_no_answer_is_named_after_the_answers_before(main, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The list", "id": "a"}\n{"prompt": ""}\n')

    code, out, err = main("generate", MODEL, f"--file={prompts}", "--field=prompt", "--max-tokens=4", "--json")
    _, _, why = main("generate", MODEL, f"--file={prompts}")

    assert (code, [(one["index"], one["id"]) for one in lines(out)]) == (1, [(0, "a")])
    assert "line 2 of" in err
    assert "the prompt is empty" in " ".join(err.split())
    assert "--field NAME" in " ".join(why.split())


def test_more_tokens_than_by_default_may_be_the_fewest(main, tmp_path):
    (tmp_path / "one.txt").write_text("The list\n")

    _, alone, _ = main("generate", MODEL, "The list", "--min-tokens=140", "--json")
    _, of_file, _ = main("generate", MODEL, f"--file={tmp_path / 'one.txt'}", "--min-tokens=140", "--json")

    assert [json.loads(out)["usage"]["completion_tokens"] for out in (alone, of_file)] == [140, 140]


def test_a_message_is_rendered_by_the_chat_template(main, engine):
    _, out, _ = main("generate", MODEL, "List the files", "--chat", "--system", "Be short", "--max-tokens=8")

    messages = [{"role": "system", "content": "Be short"}, {"role": "user", "content": "List the files"}]
    assert out == engine.generate(messages, max_tokens=8).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([GIVEN["upper"], "--use", "uper"], 1, "did you mean 'upper'?"),
        (["--use", "sql"], 1, "--adapter sql=FOLDER"),
        (["--adapter", "upper"], 2, "'upper' is not NAME=SOURCE"),
        ([GIVEN["upper"], GIVEN["upper"]], 2, "two adapters are called 'upper'"),
        (["--adapter", "sql=no-such-folder"], 1, "no-such-folder"),
        (["--max-tokens", "600"], 1, "the model holds 512"),
        (["--min-tokens", "600"], 1, "min_tokens 600 is more than max_tokens"),
        (["--logit-bias", "a=1"], 2, "'a=1' is not ID=VALUE"),
        (["--logit-bias", "1=1", "--logit-bias", "01=2"], 2, "token 1 has two biases"),
        (["--system", "Be short"], 2, "add --chat"),
        (["--logprobs", "1"], 2, "add --json"),
        (["--file", "x"], 1, "x cannot be read"),
        (["--file", "x" * 300], 1, "File name too long"),
        (["--field", "x"], 2, "it needs --file"),
        (["--out", "x.txt"], 2, "it needs --file"),
        (["--file", __file__, "--out", "x.csv"], 2, "'x.csv' ends in none of"),
        (["--file", __file__, "--out", "x.txt", "--json"], 2, "--out x.jsonl writes JSON"),
        (["--overwrite"], 2, "it is about the file of --out"),
        (["--file", __file__], 2, "give a prompt, - for stdin, or --file"),
        (["--regex", "a", "--choice", "a"], 1, "exclude each other"),
        (["--top-p", "2"], 1, "top_p"),
    ],
)
def test_what_cannot_be_generated_is_told_on_stderr(main, arguments, code, told):
    exit_code, out, err = main("generate", MODEL, PROMPT, *arguments)

    assert (exit_code, out) == (code, "")
    assert told in " ".join(err.replace("│", " ").split())


def test_options_are_checked_before_anything_is_loaded(main):
    code, _, err = main("generate", "no-such-folder", PROMPT, "--max-tokens", "0")

    assert code == 1
    assert "max_tokens" in err


@pytest.mark.parametrize("command", ["generate", "embed"])
def test_a_missing_checkpoint_is_told_with_its_name(main, command):
    code, out, err = main(command, "no-such-folder", "text")

    assert (code, out) == (1, "")
    assert "'no-such-folder'" in err
    assert "hint: " in err


def test_embed_shows_a_line_for_each_text(main, engine):
    code, out, err = main("embed", MODEL, "The list of files", "An iterator")

    rows = [line.split() for line in out.splitlines()]
    vectors = engine.embed(["The list of files", "An iterator"])
    assert (code, err) == (0, "")
    assert " ".join(rows[0]) == "INDEX TOKENS DIM FIRST VALUES"
    assert [(row[0], row[2]) for row in rows[1:]] == [("0", "128"), ("1", "128")]
    assert [row[3] for row in rows[1:]] == [f"{vector[0]:+.4f}" for vector in vectors]


def test_embed_json_is_a_line_for_each_text_with_the_whole_vector(main, engine):
    _, out, _ = main("embed", MODEL, "The list of files", "An iterator", "--json")

    found = lines(out)
    assert [line["index"] for line in found] == [0, 1]
    assert {(line["schema"], line["dim"], line["truncated"]) for line in found} == {(1, 128, False)}
    np.testing.assert_array_equal(
        np.array([line["vector"] for line in found], np.float32), engine.embed(["The list of files", "An iterator"])
    )


def test_embed_reads_lines_of_stdin(main, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The list of files\nAn iterator\n")))

    _, out, _ = main("embed", MODEL, "-", "--json")

    np.testing.assert_array_equal(
        np.array([line["vector"] for line in lines(out)], np.float32),
        engine.embed(["The list of files", "An iterator"]),
    )


def test_embed_pools_as_asked(main):
    _, out, _ = main("embed", MODEL, PROMPT, "--pooling", "mean", "--json")

    with lorax_core.load(MODEL, pooling="mean") as engine:
        expected = engine.embed(PROMPT)
    np.testing.assert_array_equal(np.array(lines(out)[0]["vector"], np.float32), expected)


def test_embed_keeps_the_dimensions_and_names_the_prompt_that_are_asked_for(main, engine):
    _, out, _ = main("embed", MODEL, PROMPT, "--dimensions", "5", "--json")
    code, _, err = main("embed", MODEL, PROMPT, "--prompt-name", "query")

    assert lines(out)[0]["vector"] == engine.embed(PROMPT, dimensions=5).tolist()
    assert (code, "no prompt is called 'query'" in err) == (1, True)


def test_embed_refuses_a_long_text_and_cuts_it_when_asked(main):
    long = "word " * 600

    refused, out, why = main("embed", MODEL, long)
    code, cut, warning = main("embed", MODEL, long, "--truncate", "end", "--json")

    assert (refused, out) == (1, "")
    assert "--truncate end" in why
    assert code == 0
    assert [(line["tokens"], line["truncated"]) for line in lines(cut)] == [(512, True)]
    assert warning == "warning: text 0 was cut to 512 tokens\n"


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["embed", "--help"]], ids=" ".join)
def test_help_imports_neither_torch_nor_transformers_nor_numpy(words):
    code = (
        f"import sys\nfrom lorax_core.cli.main import main\ntry:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert "Usage: lorax" in done.stdout
    assert done.stderr.split() == []
