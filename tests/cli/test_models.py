"""`lorax models` among strangers that are really installed."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

FAILING = {
    "lorax-bad": {"code": "raise RuntimeError('no luck')"},
    "lorax-gone": {"code": "import sys; sys.exit(1)"},
    "lorax-new": {"requires": ("lorax-core>=99",)},
    "other-bert": {"model_type": "bert"},
}


def make_failing(strangers):
    for package, how in FAILING.items():
        strangers.install(package, **how)


def test_the_list_has_a_row_for_each_architecture(main):
    code, out, err = main("models", "list")

    rows = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert " ".join(rows[0]) == "MODEL TYPE TASKS ATTENTION LORA PACKAGE VERSION STATUS"
    encoder, decoder = (next(row for row in rows if row[0] == name) for name in ("bert", "qwen2"))
    classifying = ["token-classification,", "sequence-classification"]
    assert encoder[:7] == ["bert", "embed,", *classifying, "bidirectional", "yes", "lorax-bert"]
    assert decoder[:7] == ["qwen2", "generate,", "embed,", *classifying, "causal", "yes"]


def test_on_a_terminal_the_list_is_a_table_that_fits(main, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    code, out, _ = main("models", "list")

    assert code == 0
    assert "model type" in out
    assert "bidirectional" in out
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in out.splitlines()) <= 80


def test_a_task_narrows_the_list(main):
    _, out, _ = main("models", "list", "--task", "generate")

    assert "qwen2" in out
    assert "bert" not in out


def test_a_task_that_nobody_serves_is_reported(main, monkeypatch):
    monkeypatch.setenv("LORAX_PLUGINS", "lorax-bert")

    code, out, err = main("models", "list", "--task", "generate")

    assert (code, out) == (0, "")
    assert "no installed architecture supports the task 'generate'" in err


def test_an_empty_house_says_how_to_fill_it(main, monkeypatch):
    monkeypatch.setenv("LORAX_PLUGINS", "lorax-core")

    code, out, err = main("models", "list")

    assert (code, out) == (0, "")
    assert "hint: pip install lorax-qwen2" in err


def test_the_json_of_the_list_keeps_its_shape(lorax, strangers):
    strangers.install(version="2.3")
    strangers.install("lorax-bad", "raise RuntimeError('no luck')")

    done = lorax("models", "list", "--json", LORAX_PLUGINS="stranger,lorax-bad")

    assert done.returncode == 0
    assert json.loads(done.stdout) == {
        "schema": 1,
        "models": [
            {
                "model_type": "stranger",
                "summary": "Somebody else's architecture.",
                "tasks": ["embed"],
                "default_task": "embed",
                "attention": "bidirectional",
                "lora": True,
                "plugin": "stranger",
                "package": "lorax-stranger",
                "version": "2.3",
                "status": "ready",
            }
        ],
        "problems": [
            {
                "plugin": "bad",
                "package": "lorax-bad",
                "version": "1.0",
                "status": "broken",
                "cause": "RuntimeError: no luck (at lorax_bad/plugin.py:1)",
                "hint": "`lorax plugins doctor` tries every plugin on its own",
            }
        ],
    }


def test_failing_strangers_are_told_and_change_nothing_else(lorax, strangers):
    make_failing(strangers)

    done = lorax("models", "list")

    assert done.returncode == 0
    assert "qwen2" in done.stdout
    assert "lorax-bert" not in done.stdout
    assert "warning: plugin lorax-bad 1.0 is broken: RuntimeError: no luck" in done.stderr
    assert "warning: plugin lorax-gone 1.0 is broken: SystemExit: 1" in done.stderr
    assert "warning: plugin lorax-new 1.0 is incompatible: it requires lorax-core>=99" in done.stderr
    assert "warning: plugin other-bert 1.0 is in conflict: model type 'bert' is claimed by lorax-bert" in done.stderr
    assert "hint: to keep other-bert, set LORAX_BLOCK_PLUGINS=lorax-bert" in done.stderr


def test_all_shows_what_cannot_be_used(lorax, strangers):
    make_failing(strangers)

    done = lorax("models", "list", "--all", "--json", LORAX_BLOCK_PLUGINS="qwen2")

    models = json.loads(done.stdout)["models"]
    assert {(model["model_type"], model["package"], model["status"]) for model in models} >= {
        (None, "lorax-bad", "broken"),
        (None, "lorax-new", "incompatible"),
        (None, "lorax-qwen2", "blocked"),
        ("bert", "lorax-bert", "conflict"),
        ("bert", "other-bert", "conflict"),
    }


@pytest.mark.parametrize(("options", "environ"), [(["--strict"], {}), ([], {"LORAX_STRICT": "1"})])
def test_strict_turns_a_failing_stranger_into_an_exit_code(lorax, strangers, options, environ):
    strangers.install("lorax-bad", "raise RuntimeError('no luck')")

    done = lorax("models", "list", *options, **environ)

    assert done.returncode == 1
    assert "plugin lorax-bad 1.0 is broken: RuntimeError: no luck" in done.stderr


def test_strict_is_content_when_all_is_well(main):
    assert main("models", "list", "--strict")[0] == 0


def test_a_conflict_is_settled_by_name(lorax, strangers):
    strangers.install("other-bert", model_type="bert")

    done = lorax("models", "show", "bert", "--json", LORAX_BLOCK_PLUGINS="lorax-bert")

    assert json.loads(done.stdout)["model"]["package"] == "other-bert"


def test_show_tells_what_an_architecture_serves_and_who_brings_it(main):
    code, out, err = main("models", "show", "qwen2")

    assert (code, err) == (0, "")
    assert "generate (default), embed" in out
    assert "Qwen2ForCausalLM: generate" in out
    assert "lorax_qwen2.modeling:FlashQwen2Model" in out


def test_show_has_the_whole_declaration_as_json(main):
    from lorax_core import ArchitectureSpec

    code, out, _ = main("models", "show", "qwen2", "--json")

    said = json.loads(out)
    assert (code, said["schema"]) == (0, 1)
    assert said["model"]["attention"] == "causal"
    assert ArchitectureSpec.model_validate(said["model"]["spec"]).model_type == "qwen2"


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (None, "has no config.json", "is this its folder?"),
        ('{"model_type": "qwen2",}', "is not JSON: ", "download or copy it again"),
        ('{"model_type": "gpt3"}', "no plugin provides model type 'gpt3'; installed: ", "did you mean 'gpt2'?"),
        ('{"model_type": "qwen22"}', "no plugin provides model type 'qwen22'", "did you mean 'qwen2'?"),
    ],
)
def test_check_refuses_a_checkpoint_whose_config_nobody_can_serve(main, tmp_path, config, message, hint):
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")

    code, out, err = main("models", "check", os.fspath(tmp_path))

    assert (code, out) == (1, "")
    assert message in err
    assert hint in err


def test_check_of_a_broken_plugin_s_checkpoint_says_what_is_broken(lorax, strangers, tmp_path):
    strangers.install("lorax-gpt2", "import not_there")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")

    done = lorax("models", "check", os.fspath(tmp_path))

    assert done.returncode == 1
    assert "model type 'gpt2' is unavailable: plugin lorax-gpt2 1.0 is broken: ModuleNotFoundError" in done.stderr


def test_listing_and_showing_import_no_cases_of_a_plugin(lorax, strangers):
    """The installed packages are really there; only a plugin whose `cases` cannot be imported tells whether they are read."""
    strangers.install("lorax-caseless", model_type="caseless", cases="lorax_caseless.nowhere:CASES")

    listed, shown = lorax("models", "list", "--json"), lorax("models", "show", "caseless", "--json")

    assert "caseless" in listed.stdout
    assert (listed.returncode, shown.returncode) == (0, 0)
    assert '"cases": "lorax_caseless.nowhere:CASES"' in shown.stdout
