"""`lorax plugins check`: the conformance kit from the command line.

Decides what is shown of the results. Knows nothing of what is checked; `lorax_core.testing` does, and is imported when the
command runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorax_core.cli.render import data_only_stdout, print_message, show_json, show_table

if TYPE_CHECKING:
    from lorax_core.plugins.record import PluginRecord
    from lorax_core.testing import CheckResult

    Progress = Callable[[CheckResult], None]

_STATUSES = ("failed", "badly-conditioned", "known", "passed", "skipped")
"""The worst first: one failed variant makes the row of a check failed."""
_COLUMNS = ("check", "proves", "variants", "error", "tolerance", "status")


def check_plugin(
    model_type: Annotated[str, typer.Argument(metavar="TYPE", help="As `lorax models list` shows it.")],
    device: Annotated[str, typer.Option(help="Where our model runs; the reference stays on the CPU.")] = "cpu",
    backend: Annotated[str | None, typer.Option(help="Attention backend, instead of the first that fits.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Only this check; may be repeated.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Only this tiny variant; may be repeated.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Test an architecture against its reference, check by check. Exits with 1 when a check fails or proves nothing."""
    from lorax_core.plugins.host import PluginHost

    with data_only_stdout():
        host = PluginHost.discover()
        owner = host.owner(model_type)
        import torch  # late: not needed to reject an unknown model type

        from lorax_core.testing import run_checks

        torch.set_num_threads(1)  # for models as tiny as these, more threads only wait for each other
        # Inside data_only_stdout: the checks run the plugin's code, which may print.
        with _progress() as progress:
            results = run_checks(
                model_type,
                host=host,
                device=device,
                backend=backend,
                checks=check or (),
                variants=variant or (),
                progress=progress,
            )
    counts = Counter(str(result.status) for result in results)
    if json:
        show_json(_report(model_type, owner, device, backend, results, counts))
    else:
        show_table(_COLUMNS, _rows(results))
        _print_results(results, counts)
    if not _is_proof(results, counts):
        raise typer.Exit(1)


def _is_proof(results: Sequence[CheckResult], counts: Counter[str]) -> bool:
    """Whether nothing failed, and nothing was left open: a run that judged nothing must not look like a success in CI."""
    return not counts["failed"] and not counts["badly-conditioned"] and not _all_refused(results)


def _all_refused(results: Sequence[CheckResult]) -> bool:
    """Whether the attention backend supports no variant, so that no check of the model ran."""
    # Checks of the declaration need no backend, and pass whatever it supports.
    of_variants = [result for result in results if result.variant is not None]
    return bool(of_variants) and all(result.refused for result in of_variants)


@contextlib.contextmanager
def _progress() -> Iterator[Progress | None]:
    """On a terminal, the check that ran last; in a pipe nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("checking") as status:
        yield lambda result: status.update(Text(f"{result.key}: {result.status}"))


def _report(
    model_type: str,
    owner: PluginRecord,
    device: str,
    backend: str | None,
    results: Sequence[CheckResult],
    counts: Counter[str],
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "plugin": owner.name,
        "package": owner.package,
        "version": owner.version,
        "device": device,
        "backend": backend,
        "ok": _is_proof(results, counts),
        "counts": {status: counts[status] for status in _STATUSES},
        "results": [result.to_json() for result in results],
    }


def _rows(results: Sequence[CheckResult]) -> Iterator[Sequence[str]]:
    """One row a check, over all its variants: how many passed, and the largest error."""
    from lorax_core.testing.checks import CHECKS

    for check in CHECKS:
        found = [result for result in results if result.check == check.name]
        if not found:
            continue
        counts = Counter(str(result.status) for result in found)
        worst = next(status for status in _STATUSES if counts[status])
        ran = [result for result in found if result.status not in ("skipped", "badly-conditioned")]
        most = max((result for result in ran if result.ratio is not None), key=lambda r: r.ratio or 0.0, default=None)
        yield (
            check.name,
            check.proves,
            "-" if check.once else f"{counts['passed']} of {len(ran)}",
            _number(most.error if most else None),
            _number(most.tolerance if most else None),
            worst,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _print_results(results: Sequence[CheckResult], counts: Counter[str]) -> None:
    for result in results:
        if result.status == "failed":
            excess = f" ({result.excess})" if result.excess else ""
            print_message(f"{result.key}: {result.detail}{excess}", label="failed", style="red")
        elif result.status == "known":
            print_message(f"{result.key}: {result.detail}", label="known", style="yellow")
    # Once a variant: all of its checks were skipped, or left open, for the same reason.
    for label, same in (
        ("skipped", [result for result in results if result.refused]),
        ("badly conditioned", [result for result in results if result.status == "badly-conditioned"]),
    ):
        for variant, reason in {(result.variant, result.detail): None for result in same}:
            print_message(f"variant {variant}: {reason}", label=label, style="yellow")
    if _all_refused(results):
        print_message(
            "nothing was tested: the attention backend supports none of the variants",
            "`lorax doctor` lists the backends of this machine",
            label="failed",
            style="red",
        )
    summary = ", ".join(f"{counts[status]} {status.replace('-', ' ')}" for status in _STATUSES if counts[status])
    print_message(f"{summary}, in {sum(result.seconds for result in results):.1f} s")
