"""Commands whose MODEL is the address of a running server: the answers are those of the engine that it serves."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loopback import Loopback, left, until

import lorax_core
from lorax_core.cli.answering import ServerAnswers
from lorax_core.cli.chat import Talk
from lorax_core.cli.chat_commands import ChatState
from lorax_core.cli.measuring_server import spread
from lorax_core.cli.served import Server, completions_of
from lorax_core.errors import RequestError

QWEN2 = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
ADAPTERS = {name: QWEN2 / "adapters" / name for name in ("upper", "bullets")}
KEY = "key-of-the-server"
PROMPT = "The list of files"
SCHEMA = (
    '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'
)


@pytest.fixture(scope="module")
def engine():
    with lorax_core.load(QWEN2 / "model", adapters=ADAPTERS, kv_cache_tokens=4_096) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with Loopback(engine, drain_timeout=1, api_keys=(KEY,)) as server:
        yield server


@pytest.fixture
def url(server, monkeypatch):
    """Where the engine is served; the key is set."""
    monkeypatch.setenv("LORAX_API_KEYS", KEY)
    return server.url


# --- generate ---


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {"max_tokens": 128}),
        (["--use", "upper", "--max-tokens", "8"], {"adapter": "upper", "max_tokens": 8}),
        (["--temperature", "0.9", "--top-k", "9", "--top-p", "0.8", "--seed", "4", "--max-tokens", "9"],
         {"temperature": 0.9, "top_k": 9, "top_p": 0.8, "seed": 4, "max_tokens": 9}),
        (["--min-p", "0.1", "--typical-p", "0.9", "--temperature", "1", "--seed", "5", "--max-tokens", "9"],
         {"min_p": 0.1, "typical_p": 0.9, "temperature": 1.0, "seed": 5, "max_tokens": 9}),
        (["--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "1", "--max-tokens", "20"],
         {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0, "max_tokens": 20}),
        (["--logit-bias", "300=100", "--max-tokens", "3"], {"logit_bias": {300: 100.0}, "max_tokens": 3}),
        (["--stop", "of", "--min-tokens", "2"], {"stop": ["of"], "min_tokens": 2, "max_tokens": 128}),
        (["--ignore-eos", "--stop-token-id", "13", "--max-tokens", "30"],
         {"ignore_eos": True, "stop_token_ids": [13], "max_tokens": 30}),
        (["--choice", " good", "--choice", " bad"], {"choice": [" good", " bad"], "max_tokens": 128}),
        (["--min-tokens", "140"], {"min_tokens": 140, "max_tokens": 140}),
        (["--regex", "[a-c]{3}"], {"regex": "[a-c]{3}", "max_tokens": 128}),
        (["--schema", SCHEMA, "--max-tokens", "60"], {"json_schema": json.loads(SCHEMA), "max_tokens": 60}),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_server_answers_what_its_engine_does(main, url, engine, flags, options):
    code, out, err = main("generate", url, PROMPT, *flags)

    asked = engine.generate(PROMPT, **options)
    assert (code, out) == (0, f"{asked.text}\n")
    assert f"{asked.usage.completion_tokens} tokens in" in err
    assert f"ended by: {asked.finish_reason}" in err


def test_a_message_is_rendered_by_the_server_s_template(main, url, engine):
    _, out, _ = main("generate", url, "List the files", "--chat", "--system", "Be brief", "--max-tokens", "8")

    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "List the files"}]
    assert out == f"{engine.generate(messages, max_tokens=8).text}\n"


def test_json_has_all_answers_and_the_usage(main, url, engine):
    flags = ("--n", "2", "--temperature", "0.9", "--seed", "3", "--max-tokens", "6")

    _, out, _ = main("generate", url, PROMPT, "--use", "upper", "--json", *flags)
    _, text, err = main("generate", url, PROMPT, "--use", "upper", *flags)

    asked = engine.generate(PROMPT, adapter="upper", n=2, temperature=0.9, seed=3, max_tokens=6)
    [other] = asked.alternatives
    found = json.loads(out)
    assert {name: found[name] for name in ("url", "model", "adapter")} == {
        "url": url, "model": "base", "adapter": "upper",
    }  # fmt: skip
    assert (found["text"], found["finish_reason"]) == (asked.text, "length")
    assert found["alternatives"] == [{"text": other.text, "finish_reason": "length"}]
    assert found["usage"] == {"prompt_tokens": asked.usage.prompt_tokens, "completion_tokens": 12}
    assert text == f"==> answer 1 <==\n{asked.text}\n==> answer 2 <==\n{other.text}\n"
    assert "12 tokens in" in err


def test_the_address_may_have_a_name(main, url, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lorax.toml").write_text(f'[models.mine]\npath = "{url}/"\n')

    _, out, _ = main("generate", "mine", PROMPT, "--max-tokens", "4")

    assert out == f"{engine.generate(PROMPT, max_tokens=4).text}\n"


def test_what_a_subcommand_loads_with_is_not_meant_for_a_server(main, url, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lorax.toml").write_text('[generate]\nthreads = 1\ndtype = "float32"\nmax-tokens = 1\n')

    _, out, err = main("generate", url, PROMPT)

    assert out == f"{engine.generate(PROMPT, max_tokens=1).text}\n"
    assert "\n1 token in " in err


def test_options_of_a_server_that_has_a_name_are_refused(main, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lorax.toml").write_text(f'[models.mine]\npath = "{url}"\nthreads = 1\n')

    code, _, err = main("generate", "mine", PROMPT)

    assert code == 1
    assert "'threads': this is said when a model is loaded" in err


def test_what_lorax_toml_says_wrongly_of_a_server_is_named(main, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lorax.toml").write_text(f'[models.mine]\npath = "{url}"\ncheckpoint = 1\n')

    code, out, err = main("generate", "mine", PROMPT)

    assert (code, out) == (1, "")
    assert "[models.mine] has no 'checkpoint'" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "URL", PROMPT, "--use", "uper"], "did you mean 'upper'?"),
        (["generate", "URL", PROMPT, "--use", "upper=0.5"], "one adapter by its name, not for a sum"),
        (["generate", "URL", PROMPT, "--dtype", "float32"], "'dtype': this is said when a model is loaded"),
        (["generate", "URL", PROMPT, "--adapter", "a=b"], "'adapters': this is said when a model is loaded"),
        (["generate", "URL", PROMPT, "--max-tokens", "100000"], "refuses: "),
        (["generate", "http://127.0.0.1:1", PROMPT], "Connection refused"),
        (
            ["generate", "localhost:8000", PROMPT],
            "hint: the address of a server begins with http://, such as http://localhost:8000",
        ),
        (["embed", "URL", "a text"], "is a server, and this loads a model"),
        (["chat", "URL", "--threads", "1"], "'threads': this is said when a model is loaded"),
        (["bench", "URL", "--use", "nix"], "is called 'nix'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_server_cannot_be_asked_is_refused(main, url, arguments, complaint):
    code, out, err = main(*[url if one == "URL" else one for one in arguments])

    assert (code, out) == (1, "")
    assert complaint in err
    assert "hint: " in err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["generate", "URL", "--file", "prompts.txt"], "--file"),
        (["generate", "URL", PROMPT, "--logprobs", "2", "--json"], "--logprobs"),
        (["bench", str(QWEN2 / "model"), "--use", "upper"], "--use"),
    ],
)
def test_flags_that_need_another_kind_of_model_are_a_wrong_command_line(main, url, arguments, flag):
    code, out, err = main(*[url if one == "URL" else one for one in arguments])

    assert (code, out) == (2, "")
    assert f"Invalid value for {flag}" in err


def test_without_the_key_nothing_is_answered(main, server):
    code, out, err = main("generate", server.url, PROMPT)

    assert (code, out) == (1, "")
    assert "set LORAX_API_KEYS to one of the server's keys" in err
    assert KEY not in err


def test_a_key_that_the_server_does_not_know_is_said_to_be_one(main, server, monkeypatch):
    monkeypatch.setenv("LORAX_API_KEYS", "another-key-1")

    code, _, err = main("generate", server.url, PROMPT)

    assert code == 1
    assert "does not know the first key of LORAX_API_KEYS" in err
    assert "another-key-1" not in err


def test_a_server_is_asked_without_importing_torch(url, heavy):
    done = heavy("generate", url, PROMPT, "--max-tokens", "2")

    assert "2 tokens in" in done.stderr
    assert done.stderr.splitlines()[-1] == ""


def test_ctrl_c_ends_the_answer_on_the_server_too(url, engine):
    command = [sys.executable, "-m", "lorax_core", "generate", url, PROMPT, "--ignore-eos", "--max-tokens", "400"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}) as process:
        begun = process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert begun
    assert process.returncode == 130
    assert b"Traceback" not in err
    until(lambda: left(engine) == (0, 0))


# --- chat ---


@pytest.fixture
def talk(main, monkeypatch, url):
    """Runs `lorax chat` with lines on stdin: exit code, stdout, stderr."""

    def run(lines: str, *arguments: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        return main("chat", url, "--max-tokens=8", *arguments)

    return run


def test_a_conversation_goes_on_and_adapters_of_the_server_take_turns(talk, engine):
    code, out, err = talk("/adapters\nList the files\n/use upper\nMore\n")

    messages = [{"role": "user", "content": "List the files"}]
    first = engine.generate(messages, max_tokens=8).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "More"}]
    assert (code, out) == (0, f"{first}\n{engine.generate(messages, adapter='upper', max_tokens=8).text}\n")
    assert err == "* base\n  bullets\n  upper\nupper answers\n"


def test_messages_may_be_joined_as_text(talk, engine):
    _, out, _ = talk("List the files", "--plain", "--use", "bullets")

    asked = engine.generate("User: List the files\nAssistant:", adapter="bullets", max_tokens=8, stop="\nUser:")
    assert out == f"{asked.text}\n"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("/use nix", "no adapter is called 'nix'; given are 'bullets', 'upper'\n  hint: /adapters lists them"),
        ("/use upper=0.5,bullets=0.5\nHello", "one adapter by its name, not for a sum"),
    ],
)
def test_what_the_server_does_not_have_is_an_error_of_the_conversation(talk, line, complaint):
    code, out, err = talk(line)

    assert (code, out) == (1, "")
    assert complaint in err


def test_an_answer_that_was_cut_off_is_said_to_be_at_a_terminal(other, capsys):
    answering = ServerAnswers(Server.at(f"{other}/cut-off"))

    Talk(answering, ChatState({}), plain=False, at_terminal=True).turn("Hello")

    said = capsys.readouterr()
    assert said.out == "a\n"
    assert "cut off: --max-tokens" in said.err


# --- bench ---


def test_a_server_is_measured_as_its_clients_see_it(main, url, server):
    few = ("--prompt-tokens", "20", "--max-tokens", "3", "--repeats", "2", "--concurrency", "3,1")

    _, before, _ = main("bench", url, "--json", "--use", "upper,base", *few)
    code, out, err = main("bench", url, *few)

    found = json.loads(before)
    assert {name: found[name] for name in ("url", "model", "adapters")} == {
        "url": url, "model": "base", "adapters": ["upper", "base"],
    }  # fmt: skip
    assert [one["concurrency"] for one in found["figures"]] == [1, 3]
    for one in found["figures"]:
        assert one["prompt_tokens_per_second"] > 0
        assert one["first_token_ms"]["p50"] <= one["first_token_ms"]["p99"]
        assert one["memory_share"] is None
    assert code == 0
    assert "MEMORY" not in out.splitlines()[0]
    assert f"url: {url}" in err
    until(lambda: server.metric("lorax_running") == 0)


def test_pieces_share_the_tokens_whose_sum_is_known():
    assert spread([1.0, 2.0, 3.0], 3) == [(1.0, 1), (2.0, 1), (3.0, 1)]
    assert [tokens for _, tokens in spread([1.0, 2.0, 3.0, 4.0], 10)] == [2, 3, 3, 2]
    assert [tokens for _, tokens in spread([1.0, 2.0, 3.0], 2)] == [1, 0, 1]


# --- other servers ---

MODELS = {"data": [{"id": "one", "parent": None}, {"id": "two"}]}
EVENTS = {
    "fine": [
        {"choices": [{"index": 0, "text": "a", "finish_reason": None, "logprobs": None}], "usage": None},
        {"choices": [{"index": 0, "text": "b", "finish_reason": "content_filter"}]},
        {"choices": [], "usage": {"prompt_tokens": 3}},
    ],
    "number": [{"choices": [{"text": 3}]}],
    "bare": [{"choices": [3]}],
    "negative": [{"choices": [], "usage": {"prompt_tokens": -7}}],
    "another": [{"choices": [{"index": 1, "text": "a"}]}],
    "cut-off": [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}},
    ],
    "usage": [{"choices": [], "usage": {"prompt_tokens": "many"}}],
    "done": [],
    "endless": [{"choices": [{"text": "a"}]}, {"choices": [], "usage": {"prompt_tokens": 64, "completion_tokens": 1}}],
    "nothing": [{"choices": [{"text": "a"}]}],
    "measured": [
        {"choices": [{"text": "a"}]},
        {"choices": [], "usage": {"prompt_tokens": 128, "completion_tokens": 1}},
    ],
}


class Handler(BaseHTTPRequestHandler):
    """A server of another kind, which is wrong in the way that its path names."""

    def do_GET(self):
        models = {"empty": [], "adapters-first": [{"id": "two", "parent": "one"}, {"id": "one"}]}
        self.answer(json.dumps({"data": models.get(self.path.split("/")[1], MODELS["data"])}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.path.startswith("/endless") and body["max_tokens"] > 1:
            self.fail_or_stream()
            return
        lines = [f"data: {json.dumps(event)}\n\n" for event in EVENTS[self.path.split("/")[1]]]
        self.answer("".join([*lines, "data: [DONE]\n\n"]))

    def fail_or_stream(self):
        """The first request fails, when there are two; the other is answered until its client goes."""
        try:
            first = self.server.both.wait(timeout=60) == 0
            self.send_response(500 if first else 200)
            self.end_headers()
            while not first:
                self.wfile.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        except OSError:
            self.server.gone.set()

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def other_server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.both, server.gone, server.bodies = threading.Barrier(2), threading.Event(), []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def other(other_server):
    """Where the servers of another kind are."""
    return f"http://127.0.0.1:{other_server.server_port}"


def test_a_server_of_another_kind_answers_with_any_of_its_models(other):
    server = Server.at(f"{other}/fine")

    [found] = completions_of(server.stream(lorax_core.GenerateRequest(prompt="x")))

    assert (server.base, server.adapters, server.chosen("two"), server.chosen("one")) == ("one", ("two",), "two", None)
    assert (found.text, found.finish_reason, found.usage.prompt_tokens) == ("ab", "stop", 3)


def test_the_base_is_the_model_without_a_parent_wherever_it_is_listed(other):
    server = Server.at(f"{other}/adapters-first")

    assert (server.base, server.adapters) == ("one", ("two",))


@pytest.mark.parametrize("wrong", ["number", "bare", "usage", "negative", "another"])
def test_events_of_another_form_are_refused(other, wrong):
    server = Server.at(f"{other}/{wrong}")

    with pytest.raises(RequestError, match=r"not of OpenAI's form\n  hint: "):
        list(server.stream(lorax_core.GenerateRequest(prompt="x")))


def test_the_address_may_be_that_which_clients_of_openai_are_given(other):
    server = Server.at(f"{other}/fine/v1/")

    assert server == Server.at(f"{other}/fine")


def test_an_answer_without_events_is_an_error(main, other):
    code, out, err = main("generate", f"{other}/done", PROMPT, "--json")

    assert (code, out) == (1, "")
    assert "ended its answer before it began" in err


def test_a_server_without_models_is_refused(other):
    with pytest.raises(RequestError, match="serves no model"):
        Server.at(f"{other}/empty")


def test_what_is_measured_is_what_was_asked_for(main, other, other_server):
    """Of that server a word has two tokens."""
    few = ("--prompt-tokens", "30", "--max-tokens", "4", "--concurrency", "3", "--repeats", "1", "--seed", "7")

    asked = []
    for _ in range(2):
        other_server.bodies.clear()
        main("bench", f"{other}/measured", "--use", "one,two", *few)
        asked.append(sorted((body["model"], body["max_tokens"], body["prompt"]) for body in other_server.bodies))

    assert asked[0] == asked[1]
    # One request to see what a word has; then, to warm up and to measure, prompts alone and prompts with answers.
    assert Counter((model, tokens, len(prompt.split())) for model, tokens, prompt in asked[0]) == {
        ("one", 1, 64): 1, ("one", 1, 15): 4, ("two", 1, 15): 2, ("one", 4, 15): 4, ("two", 4, 15): 2,
    }  # fmt: skip


def test_a_request_that_fails_ends_those_that_are_measured_beside_it(main, other, other_server):
    code, out, err = main("bench", f"{other}/endless", "--concurrency", "2", "--max-tokens", "3")

    assert (code, out) == (1, "")
    assert "status 500" in err
    assert other_server.gone.wait(60)


def test_a_server_without_usage_is_not_measured(main, other):
    code, out, err = main("bench", f"{other}/nothing")

    assert (code, out) == (1, "")
    assert "does not say how many tokens an answer has" in err
