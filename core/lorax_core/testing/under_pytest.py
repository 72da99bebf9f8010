"""The kit as a test of pytest: one parameter for each variant and check.

Decides how an outcome becomes a pass, a failure, an expected failure or a skip. The only module here that imports pytest,
and that late: the kit runs without it.
"""

from __future__ import annotations

from collections.abc import Callable

from lorax_core.plugins.host import PluginHost
from lorax_core.plugins.spec import ArchitectureSpec
from lorax_core.testing.check import Check
from lorax_core.testing.result import CheckResult, CheckStatus
from lorax_core.testing.suite import Suite


def conformance(
    architecture: str | ArchitectureSpec,
    *,
    host: PluginHost | None = None,
    device: str = "cpu",
    backend: str | None = None,
) -> Callable[..., None]:
    """A test function that runs the kit: `test_conformance = conformance("gpt2")`.

    Plugins are discovered when the test module is imported; a plugin that is not installed is an error then.
    """
    import pytest

    suite = Suite(architecture, host=host, device=device, backend=backend)
    planned = [
        pytest.param(variant, check, id=check.name if variant is None else f"{variant}-{check.name}")
        for variant, check in suite.plan()
    ]

    @pytest.mark.parametrize(("variant", "check"), planned)
    def test_conformance(variant: str | None, check: Check, request: pytest.FixtureRequest) -> None:
        module = request.node.getparent(pytest.Module)
        # The tests of a module share the suite, so its checkpoints go when the module is done.
        if module is not None:
            module.addfinalizer(suite.close)
        result = suite.run(variant, check)
        if result.status is CheckStatus.SKIPPED:
            pytest.skip(result.detail)
        if result.status is CheckStatus.KNOWN:
            pytest.xfail(result.detail)
        # No verdict on the plugin, but no proof either: a green run must not hide that nothing was judged.
        if result.status is CheckStatus.BADLY_CONDITIONED:
            pytest.fail(f"badly conditioned, not judged: {failure_text(check, result)}", pytrace=False)
        if result.status is CheckStatus.FAILED:
            # Without a traceback: it would show the kit, and the mistake is in the plugin.
            pytest.fail(failure_text(check, result), pytrace=False)

    return test_conformance


def failure_text(check: Check, result: CheckResult) -> str:
    """The message of a failure: the property, the error, and where it is."""
    return "\n  ".join(filter(None, (f"{result.key}: {check.proves}", result.detail, result.excess)))
