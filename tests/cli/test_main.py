"""The command as a whole: exit codes, help, where data and talk go, and what is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lorax_core
from lorax_core.cli.main import EXIT_CODES

NAMED = ("small", "smaller", "big")


@pytest.mark.parametrize(
    "arguments",
    [["models", "list"], ["models", "list", "--json", "--all"], ["models", "show", "qwen2"], ["plugins", "list"]],
    ids=" ".join,
)
def test_looking_around_imports_neither_torch_nor_transformers_nor_numpy(arguments, heavy):
    done = heavy(*arguments)

    assert "qwen2" in done.stdout
    assert done.stderr.split() == []


def test_the_version(main):
    assert main("--version") == (0, f"lorax {lorax_core.__version__}\n", "")


@pytest.mark.parametrize("words", [[], ["models"], ["models", "list"], ["plugins", "doctor"]], ids=" ".join)
def test_help_is_data_for_those_who_ask(main, words):
    code, out, err = main(*words, "--help")

    assert (code, err) == (0, "")
    assert " ".join(["Usage: lorax", *words]) in out


def test_exit_codes_are_in_the_help_and_in_the_documentation(main):
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")

    _, out, _ = main("--help")

    shown = " ".join(out.split())
    assert [f"{code}: {meaning}." for code, meaning in EXIT_CODES.items() if f"{code}: {meaning}." not in shown] == []
    assert "".join(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items()) in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["modles"], "Did you mean 'models'?"),
        (["models", "lst"], "No such command 'lst'"),
        (["models", "list", "--task", "poetry"], "'poetry' is not one of"),
        (["models", "show"], "Missing argument 'TYPE'"),
    ],
)
def test_a_wrong_command_line_exits_with_2(main, arguments, complaint):
    code, out, err = main(*arguments)

    assert (code, out) == (2, "")
    assert complaint in err


def test_an_error_is_told_on_stderr_with_its_hint_and_exits_with_1(main):
    code, out, err = main("models", "show", "qwenn2")

    assert (code, out) == (1, "")
    assert err.startswith("error: no plugin provides model type 'qwenn2'")
    assert "hint: did you mean 'qwen2'?" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--debug", "--verbose"])
def test_the_traceback_is_there_for_those_who_ask(main, option):
    code, _, err = main(option, "models", "show", "qwenn2")

    assert code == 1
    assert "Traceback" in err
    assert "error: no plugin provides model type 'qwenn2'" in err


def test_a_bad_setting_is_an_error_like_any_other(main, monkeypatch):
    monkeypatch.setenv("LORAX_PLUGINS", "lorax bert")

    code, out, err = main("models", "list")

    assert (code, out) == (1, "")
    assert "LORAX_PLUGINS holds 'lorax bert'" in err


def test_what_a_plugin_prints_does_not_spoil_the_data(lorax, strangers):
    strangers.install("lorax-chatty", "print('hello from chatty')\nraise RuntimeError('no luck')")

    done = lorax("models", "list", "--json")

    assert json.loads(done.stdout)["problems"][0]["cause"].startswith("RuntimeError: no luck")
    assert "hello from chatty" in done.stderr


@pytest.mark.parametrize(
    ("words", "found"),
    [("lorax ge", "generate"), ("lorax adapters me", "merge"), ("lorax generate x y --max-t", "--max-tokens")],
)
def test_a_shell_completes_commands_and_options(lorax, words, found):
    count = str(len(words.split()) - 1)

    done = lorax(_LORAX_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)

    assert done.stdout.split() == [found]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [("lorax generate sm", ["small", "smaller"]), ("lorax chat sma", ["small", "smaller"]), ("lorax embed b", ["big"])],
)
def test_a_shell_completes_models_of_the_file(lorax, tmp_path, words, found):
    tmp_path.joinpath("lorax.toml").write_text("".join(f"[models.{name}]\npath = 'x'\n" for name in NAMED))

    done = lorax(_LORAX_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="2")

    assert (done.stdout.split(), done.stderr) == (found, "")


def test_a_file_that_is_wrong_completes_nothing(lorax, tmp_path):
    tmp_path.joinpath("lorax.toml").write_text("[models.small]\npath = 3\n")

    done = lorax(_LORAX_COMPLETE="complete_bash", COMP_WORDS="lorax generate s", COMP_CWORD="2")

    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_the_package_is_the_command_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lorax_core", "--version"], capture_output=True, text=True, check=True)

    assert done.stdout == f"lorax {lorax_core.__version__}\n"
