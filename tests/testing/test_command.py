"""`lorax plugins check`."""

from __future__ import annotations

import json
import sys

import pytest
from fakes import make_backend_spec, with_backends

from lorax_core.cli.main import main
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.record import PluginRecord, PluginStatus


@pytest.fixture
def lorax(capsys):
    """Runs `lorax plugins check` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            main(["plugins", "check", *arguments])
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def broken_bert(host, make_spec, monkeypatch):
    """The only plugin there is: a BERT that shifts positions, known to, and sees only backwards, which nobody knew."""
    changes = {"backbone": "broken:LooksBackOnly", "known_failures": {"numbers-hidden": "being mended"}}
    record = PluginRecord(
        "bert",
        "lorax-bert",
        "9.9",
        "lorax_bert.plugin",
        PluginStatus.READY,
        architectures=(make_spec("bert", **changes),),
    )
    alone = PluginHost([host.records[0], record])
    monkeypatch.setattr(PluginHost, "discover", classmethod(lambda cls, *arguments: alone))


def test_a_table_of_checks(lorax):
    code, out, err = lorax("bert", "--variant", "base", "--check", "packing-repeat", "--check", "numbers-embed")

    header, *rows = out.splitlines()
    assert code == 0
    assert header.split() == ["CHECK", "PROVES", "VARIANTS", "ERROR", "TOLERANCE", "STATUS"]
    assert [row.split()[0] for row in rows] == ["numbers-embed", "packing-repeat"]
    assert "1 of 1" in rows[0]
    assert rows[0].split()[-2:] == ["2.0e-05", "passed"]
    assert err.startswith("2 passed, in ")


def test_a_terminal_gets_colours(lorax, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    _, out, _ = lorax("bert", "--check", "round-trip")

    assert "\x1b[32mpassed\x1b[0m" in out


def test_what_failed_is_told_and_what_is_known_too(lorax, broken_bert):
    code, out, err = lorax("bert", "--variant", "base", "--check", "masking", "--check", "numbers-hidden")

    statuses = {row.split()[0]: row.split()[-1] for row in out.splitlines()}
    assert code == 1
    assert statuses["masking"] == "failed"
    assert statuses["numbers-hidden"] == "known"
    assert "failed: masking[base]: row " in err
    assert "times the tolerance" in err
    assert "known: numbers-hidden[base]: being mended" in err
    assert "1 failed, 1 known" in err


def test_a_variant_that_cannot_be_judged_is_told_once_and_is_no_success(lorax, host, make_spec, monkeypatch):
    record = PluginRecord("gpt2", "x", "1", "x", PluginStatus.READY, architectures=(make_spec("gpt2"),))
    alone = PluginHost([host.records[0], record])
    monkeypatch.setattr(PluginHost, "discover", classmethod(lambda cls, *arguments: alone))
    checks = ("--check", "numbers-hidden", "--check", "packing-order", "--check", "weights-missing")

    code, out, err = lorax("gpt2", "--variant", "hopeless", "--variant", "rough", *checks)

    statuses = {row.split()[0]: row.split()[-1] for row in out.splitlines()}
    assert code == 1
    assert statuses["weights-missing"] == "passed"
    assert statuses["packing-order"] == "badly-conditioned"
    assert err.count("badly conditioned: variant hopeless: in float32 the reference itself loses ") == 1
    assert "smaller initializer_range" in err
    assert "2 badly conditioned, 4 passed, in " in err


def test_json(lorax, broken_bert):
    code, out, err = lorax("bert", "--json", "--variant", "base", "--check", "masking", "--check", "numbers-hidden")

    said = json.loads(out)
    results = said.pop("results")
    assert code == 1
    assert err == ""
    assert said == {
        "schema": 1,
        "model_type": "bert",
        "plugin": "bert",
        "package": "lorax-bert",
        "version": "9.9",
        "device": "cpu",
        "backend": None,
        "ok": False,
        "counts": {"failed": 1, "badly-conditioned": 0, "known": 1, "passed": 0, "skipped": 0},
    }
    assert [(result["check"], result["variant"], result["status"]) for result in results] == [
        ("numbers-hidden", "base", "known"),
        ("masking", "base", "failed"),
    ]
    assert set(results[0]) == {"check", "variant", "status", "error", "tolerance", "ratio", "detail", "seconds"}
    assert results[1]["ratio"] > 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bertt"], "did you mean 'bert'?"),
        (["bert", "--backend", "torhc"], "did you mean 'torch'?"),
        (["bert", "--check", "numbers-hiden"], "did you mean 'numbers-hidden'?"),
        (["bert", "--device", "abacus"], "use 'cpu' or 'cuda'"),
    ],
)
def test_what_there_is_not_is_an_error_with_a_hint(lorax, arguments, told):
    code, out, err = lorax(*arguments)

    assert (code, out) == (1, "")
    assert told in err


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_backend_that_supports_no_variant_is_told_and_nothing_counts_as_passed(options, lorax, host, monkeypatch):
    spec = make_backend_spec("refusing", "RefusesAll", backend="refusing:RefusesAll")
    refusing = with_backends(host, spec)
    monkeypatch.setattr(PluginHost, "discover", classmethod(lambda cls, *arguments: refusing))

    code, out, err = lorax("bert", "--backend", "refusing", "--check", "packing-order", *options)

    assert code == 1
    if options:
        assert json.loads(out)["ok"] is False
        assert json.loads(out)["counts"]["failed"] == 0
    else:
        assert "skipped: variant relu: " in err
        assert "heads of 64 are not supported" in err
        assert "nothing was tested: the attention backend supports none of the variants" in err


def test_a_backend_that_supports_some_variants_is_no_failure(lorax, host, monkeypatch):
    spec = make_backend_spec("refusing", "RefusesWindows", backend="refusing:RefusesWindows")
    refusing = with_backends(host, spec)
    monkeypatch.setattr(PluginHost, "discover", classmethod(lambda cls, *arguments: refusing))
    only = ("--variant", "base", "--variant", "windows", "--check", "packing-order")

    code, _, err = lorax("qwen2", "--backend", "refusing", *only)

    assert code == 0
    assert "1 passed, 1 skipped" in err
    assert "skipped: variant windows: " in err
