"""`lorax serve`: every flag reaches the engine or the server, and what is wrong is known before anything is loaded."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lorax_core.cli import serve
from lorax_core.cli.main import app
from lorax_core.options import EngineOptions
from lorax_core.server.options import ServerOptions
from lorax_core.server.run import address, base_name, listen

KEYS = "# who\nfirst-key-1\n\nsecond-key-2\n"


@pytest.fixture
def served(monkeypatch):
    """What the server is given by a command, which ends at once."""
    seen = SimpleNamespace()

    def note(engine, options, bound, *, model_name):
        seen.engine, seen.server, seen.name = engine.options, options, model_name
        seen.adapters, seen.notes = list(engine.adapters), engine.info().notes
        seen.labels = [engine.classify("a", adapter=name).labels for name in seen.adapters if name == "topic"]

    module = SimpleNamespace(base_name=base_name, listen=listen, address=address, serve=note)
    monkeypatch.setattr(serve, "_server", lambda: module)
    return seen


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_every_flag_reaches_what_it_is_for(served, repository, tmp_path):
    example = repository / "examples/tiny_qwen2"
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text(KEYS)
    admin.write_text("admin-key-3\n")
    for_server = {
        "host": "127.0.0.1", "port": 0, "model_name": "small", "max_queue": 3, "max_body_bytes": 4_000, "max_batch": 5,
        "max_schema_chars": 2_000,
        "request_timeout": 6.0, "body_timeout": 7.0, "drain_timeout": 8.0, "log_format": "json",
    }  # fmt: skip
    for_engine = {
        "dtype": "float32", "device": "cpu", "quantize": "int8", "pooling": "mean", "kv_cache_tokens": 512,
        "max_batch_tokens": 64, "max_batch_rows": 9, "max_adapters": 2, "max_adapter_bytes": 10_000,
        "merge_adapter": str(example / "adapters/bullets"),
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (for_server | for_engine).items()]

    done = run(
        example / "model", *flags, "--adapter", f"up={example / 'adapters/upper'}", "--adapter-sources", "hub",
        "--cors-origin", "https://page", "--no-page", "--api-key-file", keys, "--admin-key-file", admin,
    )  # fmt: skip
    said = [json.loads(line)["message"].partition(" ")[0] for line in done.stderr.splitlines()]

    assert done.exit_code == 0, done.output
    assert {name: getattr(served.server, name) for name in for_server} == for_server
    assert {name: getattr(served.engine, name) for name in for_engine} == for_engine
    assert [key.get_secret_value() for key in served.server.api_keys] == ["first-key-1", "second-key-2"]
    assert served.server.admin_key.get_secret_value() == "admin-key-3"
    assert (served.server.cors_origins, served.server.page) == (("https://page",), False)
    assert (served.engine.adapter_sources, served.adapters, served.name) == (("hub",), ["up"], "small")
    assert said == ["loading", "serving"]
    assert "http://127.0.0.1:" in done.stderr


def test_labels_of_adapters_have_names(served, repository):
    example = repository / "examples/tiny_qwen2"
    adapters = [f"--adapter={name}={example / 'adapters' / name}" for name in ("topic", "upper")]
    names = ["a", "b:c", "d=e"]

    done = run(example / "model", "--port=0", "--kv-cache-tokens=256", *adapters,
               "--problem-type=topic=multi_label_classification",
               *[f"--label=topic:{at}={name}" for at, name in enumerate(names)])  # fmt: skip

    assert done.exit_code == 0, done.output
    assert sorted(served.labels[0]) == names
    assert served.engine.adapters["topic"].problem_type == "multi_label_classification"
    assert served.adapters == ["topic", "upper"]
    assert (served.name, "serving 'model'" in done.stderr) == (None, True)


def test_a_model_of_the_configuration_is_called_as_it_is_there(served, repository, tmp_path):
    file = tmp_path / "lorax.toml"
    path = repository / "examples/tiny_qwen2/model"
    file.write_text(f'[models.small]\npath = "{path}"\nkv_cache_tokens = 256\nadapter-sources = ["hub"]\n')

    done = CliRunner().invoke(app, ["--config", str(file), "serve", "small", "--port=0"])

    assert done.exit_code == 0, done.output
    assert (served.name, served.engine.adapter_sources) == ("small", ("hub",))


def test_help_shows_the_defaults_of_the_limits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = run("--help").output

    for name in ("max_queue", "max_body_bytes", "max_batch", "max_schema_chars", "port", "host", "log_format"):
        assert f"({ServerOptions.model_fields[name].default})" in said, name
    assert "(600)" in said
    assert f"({EngineOptions.model_fields['max_batch_tokens'].default})" in said


def test_keys_may_be_in_the_environment_and_requests_name_loaded_adapters_alone(served, repository, monkeypatch):
    monkeypatch.setenv("LORAX_API_KEYS", "first-key-1, second-key-2")
    monkeypatch.setenv("LORAX_ADMIN_KEY", "admin-key-3")

    run(repository / "examples/tiny_qwen2/model", "--port=0", "--kv-cache-tokens=256")

    assert [key.get_secret_value() for key in served.server.api_keys] == ["first-key-1", "second-key-2"]
    assert served.server.admin_key.get_secret_value() == "admin-key-3"
    assert served.engine.adapter_sources == ()


def test_keys_of_a_file_are_beside_those_of_the_environment_and_its_admin_key_comes_first(
    served, repository, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORAX_API_KEYS", "first-key-1")
    monkeypatch.setenv("LORAX_ADMIN_KEY", "admin-key-3")
    keys, admin = tmp_path / "keys", tmp_path / "admin"
    keys.write_text("second-key-2\n")
    admin.write_text("admin-key-4\n")

    run(repository / "examples/tiny_qwen2/model", "--port=0", "--kv-cache-tokens=256",
        "--api-key-file", keys, "--admin-key-file", admin)  # fmt: skip

    assert [key.get_secret_value() for key in served.server.api_keys] == ["first-key-1", "second-key-2"]
    assert served.server.admin_key.get_secret_value() == "admin-key-4"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--api-key-file", "/dev/null"], "has no key"),
        (["--port", "99999"], "port"),
        (["--log-format", "xml"], "log_format"),
        (["--adapter", "nameless"], "NAME=SOURCE"),
        (["--problem-type", "topic=regression"], "is not ADAPTER=TYPE"),
        (["--adapter", "a=/no", "--problem-type", "a"], "is not ADAPTER=TYPE"),
        (["--label", "0=no"], "is not ADAPTER:ID=NAME"),
        (["--label", "topic:0=no"], "no adapter is called 'topic'"),
        (["--adapter", "a=/no", "--label", "a:x=no"], "'x=no' is not ADAPTER:ID=NAME"),
        (["--adapter", "a=/no", "--label", "a:0=no", "--label", "a:0=yes"], "has two names"),
    ],
)
def test_what_is_wrong_is_known_before_anything_is_loaded(served, flags, told):
    done = run("/no/checkpoint", *flags)

    assert done.exit_code in (1, 2)
    assert told in done.output
    assert "checkpoint" not in done.output.replace("/no/checkpoint", "")


def test_a_port_that_is_taken_is_known_before_anything_is_loaded(served):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run("/no/checkpoint", "--port", other.getsockname()[1])

    assert done.exit_code == 1
    assert "cannot listen on 127.0.0.1 port" in done.output
    assert "--port 0 takes a free one" in done.output
