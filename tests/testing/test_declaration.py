"""The checks of a declaration: what it imports, whether it is plain data, whether it is true of what it declares."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from lorax_core.plugins import ArchitectureCases, ArchitectureSpec
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.resolve import load_cases
from lorax_core.testing import CheckStatus, Suite
from lorax_core.testing.checks import CHECKS
from lorax_core.types import Task

LIGHT = next(check for check in CHECKS if check.name == "light-import")


@pytest.fixture
def declared_in(host, make_spec, tmp_path, monkeypatch):
    """The kit's word on the import of a declaration with this code."""

    def judge(code):
        (tmp_path / "somebodys_plugin.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        record = replace(host.owner("bert"), module="somebodys_plugin", architectures=(host.architecture("bert"),))
        with Suite("bert", host=PluginHost([host.records[0], record])) as suite:
            return suite.run(None, LIGHT)

    return judge


def test_a_declaration_that_names_classes_by_strings_is_light(declared_in):
    assert declared_in("from lorax_core.plugins import ArchitectureSpec").status is CheckStatus.PASSED


@pytest.mark.parametrize("heavy", ["torch", "transformers", "numpy"])
def test_a_heavy_import_is_named(declared_in, heavy):
    result = declared_in(f"import {heavy}")

    assert result.status is CheckStatus.FAILED
    assert "importing somebodys_plugin imports " in result.detail
    assert heavy in result.detail


def test_a_declaration_that_cannot_be_imported_tells_why(declared_in):
    result = declared_in("import nowhere_to_be_found")

    assert result.status is CheckStatus.FAILED
    assert "No module named 'nowhere_to_be_found'" in result.detail


def test_what_a_declaration_prints_is_no_finding(declared_in):
    assert declared_in("print('torch')").status is CheckStatus.PASSED


def test_a_spec_by_hand_has_no_module_to_import(make_spec, run):
    result = run(make_spec("bert"), "light-import")

    assert result.status is CheckStatus.SKIPPED


def test_cases_that_change_on_the_way_are_not_plain_data(make_spec, run, monkeypatch):
    spec = make_spec("bert")
    cases = load_cases(spec, None)
    odd = ArchitectureCases.model_construct(**{**dict(cases), "tiny_config": {**cases.tiny_config, "pad": (1, 2)}})
    right = run(spec, "round-trip")
    monkeypatch.setattr(sys.modules["kit_cases"], spec.cases.partition(":")[2], odd)

    result = run(spec, "round-trip")

    assert right.status is CheckStatus.PASSED
    assert result.status is CheckStatus.FAILED
    assert "written as JSON" in result.detail


def test_a_true_declaration_passes(make_spec, run):
    assert run(make_spec("bert"), "declaration").status is CheckStatus.PASSED


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backbone": "lorax_bert.modeling:FlashBerdModel"}, "has no class 'FlashBerdModel'"),
        (
            {"heads": {Task.EMBED: "lorax_core.modeling.heads:TokenClassificationHead"}},
            "for 'embed', but its task is 'token-classification'",
        ),
        ({"references": {Task.EMBED: "transformers:BertTokenizer"}}, "has no config_class"),
        ({"references": {Task.EMBED: "nowhere:Bert"}}, "importing nowhere failed"),
        ({"hf_architectures": {"BertModel": Task.TOKEN_CLASSIFICATION}}, "has 'token-classification' for 'BertModel'"),
        ({"features": ("token_types", "sliding_window")}, "no variant has one"),
        ({"features": ("token_types", "tied_embeddings")}, "every variant is tied"),
        ({"known_failures": {"numbers-hiden": "a typo"}}, "is 'numbers-hidden' meant?"),
        ({"known_failures": {"masking[nowhere]": "no such variant"}}, "names 'masking[nowhere]', which is not a check"),
        ({"known_failures": {"light-import[base]": "it is of no variant"}}, "which is not a check"),
    ],
)
def test_what_is_not_true_of_a_declaration_is_reported(changes, told, make_spec, run):
    result = run(make_spec("bert", **changes), "declaration")

    assert result.status is CheckStatus.FAILED
    assert told in result.detail


def test_a_task_without_a_reference_is_reported(make_spec, run):
    spec = make_spec("bert", default_task=Task.TOKEN_CLASSIFICATION, tasks=tuple(Task)[1:])
    more = ArchitectureSpec.model_validate({**dict(spec), "causal": True, "tasks": tuple(Task)})

    result = run(more, "declaration")

    assert "references names no class for 'generate'" in result.detail


def test_a_reference_for_a_task_that_the_architecture_lacks_is_reported(make_spec, run):
    result = run(make_spec("bert", references={Task.GENERATE: "transformers:BertLMHeadModel"}), "declaration")

    assert "references names 'generate', which is not one of the tasks" in result.detail


@pytest.mark.parametrize(("window", "status"), [(16, CheckStatus.PASSED), (1000, CheckStatus.FAILED)])
def test_a_window_may_have_another_name_in_files(window, status, make_spec, run):
    tiny = load_cases(make_spec("bert"), None).tiny_config
    spec = make_spec(
        "bert",
        features=("sliding_window",),
        hf_architectures={"ModernBertModel": Task.EMBED},
        references={Task.EMBED: "transformers:ModernBertModel"},
        tiny_config={**tiny, "pad_token_id": 0, "local_attention": window},
    )

    assert run(spec, "declaration").status is status


def test_a_tiny_model_that_is_not_tiny_is_reported(make_spec, run):
    tiny = load_cases(make_spec("bert"), None).tiny_config

    result = run(make_spec("bert", tiny_config={**tiny, "vocab_size": 9000}), "declaration")

    assert result.status is CheckStatus.FAILED
    assert "should stay under 1,000,000" in result.detail
