"""`lorax.toml`: models by name, options by subcommand, and what is wrong with a file is said before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorax_core.cli.config import find_config, read_config
from lorax_core.cli.loading import Loading

UPPER = "examples/tiny_qwen2/adapters/upper"


@pytest.fixture
def toml(tmp_path, monkeypatch):
    """Writes the `lorax.toml` of an empty folder, and goes there."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="lorax.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_model_has_a_name_its_adapters_and_its_options(main, toml, repository):
    toml(f"""
        [models.small]
        path = "{repository}/examples/tiny_qwen2/model"
        adapters = {{upper = "{repository}/{UPPER}"}}
        kv-cache-tokens = 64

        [generate]
        max-tokens = 4
        json = true
    """)

    _, out, err = main("generate", "small", "The list", "--use", "upper", "--max-tokens", "3")

    found = json.loads(out)
    assert (found["adapter"], found["usage"]["completion_tokens"]) == ("upper", 3)
    assert found["text"].upper() == found["text"]
    assert "options from lorax.toml" in err


def test_a_named_model_says_of_its_adapters_what_their_files_do_not(main, toml, repository):
    toml(f"""
        [models.small]
        path = "{repository}/examples/tiny_qwen2/model"
        adapters.topic.source = "{repository}/examples/tiny_qwen2/adapters/topic"
        adapters.topic.id2label = {{0 = "numbers", 1 = "files", 2 = "tests"}}
    """)

    asked = ("classify", "small", "Return True if the path is a file.", "--use", "topic", "--json")
    _, out, _ = main(*asked)
    _, renamed, _ = main(*asked, "--label", "0=a", "--label", "1=b", "--label", "2=c")

    assert json.loads(out)["labels"][0]["label"] == "files"
    assert json.loads(renamed)["labels"][0]["label"] == "b"


def test_adapters_of_a_named_model_answer_only_when_they_are_chosen(main, toml, repository):
    toml(f"""
        [models.small]
        path = "{repository}/examples/tiny_qwen2/model"
        adapters = {{upper = "{repository}/{UPPER}"}}
    """)

    _, out, _ = main("generate", "small", "The list", "--max-tokens", "2", "--json")

    assert json.loads(out)["adapter"] is None


def test_sources_are_read_from_where_the_file_lies(main, toml, repository, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(repository / "examples/tiny_qwen2")
    file = toml('[models.small]\npath = "models/model"\nadapters.upper = "models/adapters/upper"', "mine.toml")
    monkeypatch.chdir("/")

    code, out, err = main("--config", str(file), "generate", "small", "The list", "--max-tokens", "2", "--use", "upper")

    assert (code, out.isupper()) == (0, True)
    assert "options from" not in err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[genrate]\nseed = 1", "did you mean 'generate'?"),
        ("[generate]\nmax-token = 1", "did you mean 'max-tokens'?"),
        ("[adapters.merge]\nstrtegy = 'svd'", "did you mean 'strategy'?"),
        ("adapters = 3", "'adapters' is a table of options"),
        ("[models.small]\ndtype = 'float32'", "[models.small] has no path"),
        ("[models.small]\npath = 'a'\nadapters = ['b']", "names and sources"),
        ("[models.small]\npath = 'a'\ndtyp = 'float32'", "did you mean 'dtype'?"),
        ("[generate]\ntemperature = true", "[generate]: 'temperature' is not true or false"),
        ("[generate]\nsystem = false", "lorax generate --help says what it takes"),
        ("[generate]\nstop = 'a'", "[generate]: 'stop' is a list"),
        ("[generate", "cannot be read"),
    ],
)
def test_a_wrong_file_is_an_error_with_the_next_step(main, toml, text, complaint):
    toml(text)
    command = ["adapters", "merge", "a", "--out", "b"] if "adapters.merge" in text else ["generate", "small", "text"]

    code, out, err = main(*command)

    assert (code, out) == (1, "")
    assert complaint in err


def test_a_value_of_another_type_is_a_wrong_command_line(main, toml):
    toml("[generate]\nmax-tokens = 'many'")

    code, _, err = main("generate", "small", "text")

    assert code == 2
    assert "Invalid value for '--max-tokens'" in err


def test_a_file_of_the_user_counts_where_there_is_none_here(main, toml, tmp_path, monkeypatch):
    settings = tmp_path / "settings/lorax"
    settings.mkdir(parents=True)
    (settings / "lorax.toml").write_text("[models]\nlist = 3")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(settings.parent))

    code, _, err = main("models", "list")

    assert code == 1
    assert str(settings) in err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a = " + "[" * 3_000 + "]" * 3_000, "nested too deeply"),
        ("a = " + "[" * 200 + "]" * 200, "nested more than 100 levels deep"),
        ("[generate]\nmax-tokens" + ".a" * 9_000 + " = 1", "nested more than 100 levels deep"),
        ("#" * (64 * 2**10 + 1), "larger than 65,536 bytes"),
        ("[models.small]\npath = '~nosuchuser/x'", "'~nosuchuser/x' is not a valid checkpoint"),
        (f"[models.small]\npath = '{'a' * 5_000}'", "is not a valid checkpoint"),
        ('[models.small]\npath = "a\\u0000b"', "there is no checkpoint folder"),
        ("[models.small]\npath = 'a/b/c'\nprogress = 1", "[models.small] has no 'progress'"),
        ("[models.small]\npath = 'a/b/c'\nhost = 1", "[models.small] has no 'host'"),
        ("[models.small]\npath = 'a/b/c'\nabout = 1", "[models.small] has no 'about'"),
        ("[models.small]\npath = 'a/b/c'\ncheckpoint = 'b'", "[models.small] has no 'checkpoint'"),
    ],
    ids=lambda text: text[:40],
)
def test_an_absurd_file_is_an_error_too(main, toml, text, complaint):
    toml(text)

    code, out, err = main("generate", "small", "text")

    assert (code, out) == (1, "")
    assert complaint in err
    assert "hint: " in err


def test_the_largest_file_is_read(main, toml):
    toml("#" * 64 * 2**10)

    code, _, _ = main("models", "list")

    assert code == 0


def test_a_misspelt_model_is_named(main, toml):
    toml("[models.small]\npath = 'a'")

    code, _, err = main("generate", "smal!", "text")

    assert code == 1
    assert "hint: did you mean 'small', a model of lorax.toml?" in err


def test_the_file_of_this_folder_comes_before_that_of_the_user(toml, tmp_path):
    settings = tmp_path / "settings"
    (settings / "lorax").mkdir(parents=True)
    (settings / "lorax/lorax.toml").write_text("")
    toml("")

    assert find_config(None, {"XDG_CONFIG_HOME": str(settings)}) == Path("lorax.toml")


def test_the_settings_of_the_user_are_below_the_home_by_default(toml, tmp_path):
    settings = tmp_path / "home/.config/lorax"
    settings.mkdir(parents=True)
    (settings / "lorax.toml").write_text("")

    assert find_config(None, {"HOME": str(tmp_path / "home")}) == settings / "lorax.toml"
    assert find_config(None, {"HOME": str(tmp_path)}) is None


def test_a_path_may_begin_with_the_home_of_the_user(toml, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/model").mkdir(parents=True)

    config = read_config(toml("[models.small]\npath = '~/model'"), ())

    assert config.models["small"]["path"] == str(tmp_path / "home/model")


def test_what_a_command_line_says_of_loading_comes_before_the_file(toml):
    config = read_config(toml("[models.small]\npath = 'p'\ndtype = 'float16'\nadapters = {a = 'one', b = 'two'}"), ())

    found = Loading({"dtype": "float32", "adapters": {"a": "three"}}, config).options_of("small")

    assert found == {"checkpoint": "p", "dtype": "float32", "adapters": {"a": "three", "b": "two"}}
