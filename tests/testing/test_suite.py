"""Which checks run, and what becomes of their outcomes."""

from __future__ import annotations

import json

import pytest
import torch
from fakes import make_backend_spec, with_backends

from lorax_core.errors import PluginError, RequestError
from lorax_core.testing import (
    BadlyConditioned,
    Check,
    CheckFailed,
    CheckStatus,
    Measured,
    NotApplicable,
    Suite,
    run_checks,
)
from lorax_core.testing.checks import CHECKS


@pytest.fixture
def outcome(make_spec, host):
    """What becomes of a check that does this, under these known failures."""

    def judge(run, known_failures=None, name="masking"):
        with Suite(make_spec("bert", known_failures=known_failures or {}), host=host) as suite:
            return suite.run("base", Check(name, "nothing", run))

    return judge


def gives(error, tolerance=1.0):
    return lambda case: Measured(error, tolerance, "here")


def raises(error):
    def run(case):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status", "detail"),
    [
        (gives(0.5), CheckStatus.PASSED, "here"),
        (gives(1.5), CheckStatus.FAILED, "here"),
        (gives(float("nan")), CheckStatus.FAILED, "here"),
        (gives(float("inf")), CheckStatus.FAILED, "here"),
        (lambda case: Measured(note="yes"), CheckStatus.PASSED, "yes"),
        (raises(CheckFailed("not so")), CheckStatus.FAILED, "not so"),
        (raises(NotApplicable("not here")), CheckStatus.SKIPPED, "not here"),
        (
            raises(BadlyConditioned("too rough")),
            CheckStatus.BADLY_CONDITIONED,
            f"too rough; {BadlyConditioned.REMEDY}",
        ),
    ],
)
def test_an_outcome(outcome, run, status, detail):
    result = outcome(run)

    assert (result.status, result.detail) == (status, detail)


def test_whatever_a_plugin_raises_is_a_finding_with_its_place(outcome):
    result = outcome(raises(ZeroDivisionError("by nothing")))

    assert result.status is CheckStatus.FAILED
    assert "ZeroDivisionError: by nothing (at " in result.detail


def test_ctrl_c_is_not_a_finding(outcome):
    with pytest.raises(KeyboardInterrupt):
        outcome(raises(KeyboardInterrupt()))


@pytest.mark.parametrize("key", ["masking", "masking[base]"])
def test_a_known_failure_is_expected_and_reported(outcome, key):
    result = outcome(gives(1.5), {key: "the edge is being mended"})

    assert result.status is CheckStatus.KNOWN
    assert result.detail == "the edge is being mended (here)"


@pytest.mark.parametrize("key", ["masking", "masking[base]"])
def test_a_known_failure_that_passes_is_a_failure(outcome, key):
    result = outcome(gives(0.5), {key: "the edge is being mended"})

    assert result.status is CheckStatus.FAILED
    assert "known_failures says it fails" in result.detail


@pytest.mark.parametrize("key", ["masking[relu]", "packing-order"])
def test_a_known_failure_elsewhere_is_no_excuse(outcome, key):
    assert outcome(gives(1.5), {key: "the edge is being mended"}).status is CheckStatus.FAILED


def test_what_does_not_apply_is_neither_known_nor_unexpected(outcome):
    assert outcome(raises(NotApplicable("not here")), {"masking": "a reason"}).status is CheckStatus.SKIPPED


def test_a_known_failure_neither_hides_nor_settles_what_was_not_judged(outcome):
    result = outcome(raises(BadlyConditioned("too rough")), {"masking": "a reason"})

    assert result.status is CheckStatus.BADLY_CONDITIONED


def test_the_plan_has_each_check_once_for_each_variant_it_applies_to(make_spec, host):
    with Suite(make_spec("bert"), host=host) as suite:
        planned = [(variant, check.name) for variant, check in suite.plan()]

    assert len(planned) == len(set(planned))
    assert planned[:2] == [(None, "light-import"), (None, "round-trip")]
    sizes = {"heads_of_32", "heads_of_80", "heads_of_96", "heads_of_128"}
    assert {variant for variant, _ in planned} == {None, "base", "relu", *sizes}
    assert ("relu", "masking") in planned
    assert not any(name.startswith("cache") or "window" in name or "generate" in name for _, name in planned)


def test_what_does_not_depend_on_the_size_of_heads_runs_on_the_first_that_the_kit_adds(make_spec, host):
    with Suite(make_spec("qwen2"), host=host) as suite:
        whole = {(variant, check.name) for variant, check in suite.plan()}
        named = suite.plan(checks=["config-defaults"], variants=["heads_of_128"])

    added = [variant for variant in suite.variants if variant.startswith("heads_of_")]
    unsized = {check.name for check in CHECKS if not check.sized and check.applies(suite.spec)}
    assert "config-defaults" in unsized
    assert not {"numbers-hidden", "numbers-generate", "adapter-peft", "quantized-int4"} & unsized
    for name in unsized:
        assert [variant for variant in added if (variant, name) in whole] == added[:1]
        assert {"base", "windows", "tied"} <= {variant for variant, check in whole if check == name}
    # Whoever names one gets it.
    assert [variant for variant, _ in named] == ["heads_of_128"]


def test_names_limit_the_plan(make_spec, host):
    with Suite(make_spec("qwen2"), host=host) as suite:
        planned = suite.plan(checks=["masking", "round-trip"], variants=["windows"])
        only = suite.plan(checks=["round-trip"])

    assert [(variant, check.name) for variant, check in planned] == [("windows", "masking")]
    assert [(variant, check.name) for variant, check in only] == [(None, "round-trip")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"checks": ["numbers-hiden"]}, "did you mean 'numbers-hidden'?"),
        ({"variants": ["rellu"]}, "did you mean 'relu'?"),
        ({"backend": "torhc"}, "did you mean 'torch'?"),
        ({"device": "abacus"}, "'abacus' is not a device"),
    ],
)
def test_what_there_is_not_is_refused(arguments, told, make_spec, host):
    with pytest.raises(RequestError) as caught:
        run_checks(make_spec("bert"), host=host, **arguments)

    assert told in str(caught.value)


def test_a_plugin_that_nobody_brings_is_refused(host):
    with pytest.raises(PluginError, match="no plugin provides model type 'bertt'"):
        run_checks("bertt", host=host)


def test_results_are_told_as_they_come_and_are_plain_data(make_spec, host):
    heard = []

    results = run_checks(
        make_spec("bert"), host=host, checks=["round-trip", "packing-order"], variants=["base"], progress=heard.append
    )

    assert results == heard
    (only,) = json.loads(json.dumps([result.to_json() for result in results], allow_nan=False))
    assert only["check"] == "packing-order"
    assert only["variant"] == "base"
    assert only["status"] == "passed"
    assert only["ratio"] == only["error"] / only["tolerance"]


def test_a_number_that_json_has_no_word_for_is_null(outcome):
    told = outcome(gives(float("inf"))).to_json()

    assert told["error"] is None
    assert told["ratio"] is None
    assert told["tolerance"] == 1.0


def test_checkpoints_are_kept_for_two_variants_and_gone_in_the_end(make_spec, host):
    order = next(check for check in CHECKS if check.name == "packing-order")
    with Suite(make_spec("qwen2"), host=host) as suite:
        first, last = suite.variants[0], suite.variants[2]
        for variant in suite.variants[:3]:
            suite.run(variant, order)
        kept = {folder.name.partition("-")[0] for folder in suite.folder.iterdir()}
        folder = suite.folder
    assert first not in kept
    assert last in kept
    assert not folder.exists()


def test_a_check_gives_the_same_error_whatever_drew_random_numbers_before(make_spec, run):
    spec = make_spec("bert")

    first = run(spec, "adapter-replaced").error
    torch.rand(1)

    assert run(spec, "adapter-replaced").error == first


def test_a_closed_suite_begins_anew(make_spec, host):
    order = next(check for check in CHECKS if check.name == "packing-order")
    with Suite(make_spec("bert"), host=host) as suite:
        suite.run("base", order)
    result = suite.run("base", order)
    suite.close()

    assert result.status is CheckStatus.PASSED


def test_every_check_has_a_name_of_its_own_and_says_what_it_proves():
    names = [check.name for check in CHECKS]

    assert len(names) == len(set(names))
    assert all(check.proves for check in CHECKS)


def test_a_variant_that_the_named_backend_refuses_is_skipped_with_its_reason(make_spec, host):
    refusing = with_backends(host, make_backend_spec("refusing", "RefusesWindows", backend="refusing:RefusesWindows"))
    with Suite(make_spec("qwen2"), host=refusing, backend="refusing") as suite:
        planned = [(variant, check) for variant, check in suite.plan() if variant in (None, "windows")]
        refused = [suite.run(variant, check) for variant, check in planned if variant is not None]
        declared = [suite.run(variant, check) for variant, check in planned if variant is None]
        base = suite.run("base", next(check for check in CHECKS if check.name == "packing-order"))

    assert len(refused) > 15
    assert {result.status for result in refused} == {CheckStatus.SKIPPED}
    assert all(result.refused and "windows are not supported" in result.detail for result in refused)
    assert not any(result.refused for result in declared)
    assert (base.status, base.refused) == (CheckStatus.PASSED, False)
