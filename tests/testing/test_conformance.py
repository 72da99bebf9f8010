"""The kit as one line of pytest in a plugin, and as a library that needs none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PLUGIN_TEST = """
import sys

import torch

from lorax_core.plugins import ArchitectureCases, ArchitectureSpec
from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.resolve import load_cases
from lorax_core.testing import conformance

torch.set_num_threads(1)
host = PluginHost.discover()
bert = host.architecture("bert")
few = {**dict(load_cases(bert, None)), "variants": {"relu": {"hidden_act": "relu"}}}
CASES = ArchitectureCases(**{**few, "known_failures": {"packing-order[relu]": "says so, and passes"}})
SHIFTED = ArchitectureCases(**{**few, "known_failures": {"packing-repeat": "it shifts"}})
sys.modules["these_cases"] = sys.modules[__name__]
spec = ArchitectureSpec(**{**dict(bert), "cases": "these_cases:CASES"})
late = ArchitectureSpec(**{**dict(bert), "backbone": "broken:ShiftsPositions", "cases": "these_cases:SHIFTED"})

test_conformance = conformance(spec, host=host)
test_late = conformance(late, host=host)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory, request):
    """What pytest says of that test module, of some of its checks."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "test_plugin.py").write_text(PLUGIN_TEST, encoding="utf-8")
    support = request.config.rootpath / "tests/support"
    command = [sys.executable, "-m", "pytest", "-vv", "-rA", "-p", "no:cacheprovider", "-W", "error", "-k"]
    done = subprocess.run(
        [*command, "(light-import or packing) and not heads_of", "-o", f"pythonpath={support}", "test_plugin.py"],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # none is needed, and each takes time
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.stdout


def test_each_variant_and_check_is_a_test(said):
    assert "PASSED test_plugin.py::test_conformance[base-packing-together]" in said
    assert "PASSED test_plugin.py::test_conformance[relu-packing-together]" in said


def test_what_does_not_apply_is_skipped_with_its_reason(said):
    (line,) = [line for line in said.splitlines() if line.startswith("SKIPPED [2]")]
    assert line.endswith("the spec was given by hand; no module declares it")


def test_a_known_failure_is_an_expected_one(said):
    assert "XFAIL test_plugin.py::test_late[base-packing-repeat] - it shifts (" in said


def test_a_known_failure_that_passes_fails(said):
    assert "FAILED test_plugin.py::test_conformance[relu-packing-order]" in said
    assert "take 'packing-order[relu]' out" in said


def test_a_failure_says_what_should_hold_and_how_far_off_it_is(make_spec, host, run):
    from lorax_core.testing.checks import CHECKS
    from lorax_core.testing.under_pytest import failure_text

    result = run(make_spec("bert", backbone="broken:ShiftsPositions"), "packing-repeat")
    check = next(check for check in CHECKS if check.name == "packing-repeat")

    text = failure_text(check, result)

    assert text.startswith("packing-repeat[base]: a forward pass is pure")
    assert "the model changed the batch's position_ids in place" in text
    assert "times the tolerance" in text


def test_the_kit_needs_no_pytest_and_its_name_nothing_heavy():
    code = (
        "import sys, lorax_core.testing as kit; assert not {'torch', 'pytest'} & set(sys.modules); "
        "kit.run_checks, kit.conformance; assert 'pytest' not in sys.modules"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert done.stderr == ""
    assert done.returncode == 0


def test_the_names_are_what_they_are_in_any_order_of_imports():
    code = (
        "import lorax_core.testing.under_pytest, lorax_core.testing.suite, lorax_core.testing as kit; "
        "assert all(isinstance(getattr(kit, name), type) or callable(getattr(kit, name)) for name in kit.__all__)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (0, "")
