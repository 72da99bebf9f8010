"""What `python -m fuzz` does: runs campaigns, shows a table of verdicts and the findings by cause, or repeats one case."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fuzz.pool import DEADLINE, run_cases
from fuzz.verdicts import Kind, Verdict

CASES = 20_000


def main(arguments: list[str] | None = None) -> int:
    """0 when nothing was found, 1 when something was, 2 for wrong arguments."""
    from fuzz.bases import build
    from fuzz.campaigns import CAMPAIGNS, schedule

    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES, help="how many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--campaign", action="append", choices=sorted(CAMPAIGNS), help="only this one; may be repeated")
    parser.add_argument("--case", type=int, help="repeat the case of this number, of one campaign")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=DEADLINE, help="seconds for one case (default: %(default)s)")
    parser.add_argument("--no-planted", action="store_true", help="do not look for the ten planted defects afterwards")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    given = parser.parse_args(arguments)
    names = given.campaign or list(CAMPAIGNS)
    if given.case is not None and len(names) != 1:
        parser.error("--case needs one --campaign")
    if given.cases < 1 or given.workers < 1:
        parser.error("--cases and --workers are at least 1")
    orders = (
        [(names[0], given.seed, given.case)]
        if given.case is not None
        else [(name, given.seed, number) for name, number in schedule(names, given.cases)]
    )
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-bases-") as folder:
        root = build(Path(folder))
        verdicts = _run(root, orders, given.workers if given.case is None else 1, given.deadline)
        seconds = time.monotonic() - start
        # Of single campaigns somebody wants those; the plants are of several.
        whole = given.case is None and given.campaign is None and not given.no_planted
        report = Report(verdicts, seconds, _plants(root) if whole else {})
    if given.json:
        print(json.dumps(report.to_json()))
    elif given.case is not None:
        _show_case(verdicts[0])
    else:
        report.show(Console())
    return 1 if report.findings or not all(report.plants.values()) else 0


def _plants(root: Path) -> dict[str, str]:
    """Each planted defect and the command of the case that found it, empty for one that none did."""
    from fuzz.planted import PLANTS
    from fuzz.search import find_plant

    found, worker = {}, None
    try:
        for name in PLANTS:
            verdict, worker = find_plant(name, root, worker)
            found[name] = f"{verdict.campaign} case {verdict.case}: {verdict.finding}" if verdict is not None else ""
    finally:
        if worker is not None:
            worker.close()
    return found


def _run(root: Path, orders: list[tuple[str, int, int]], workers: int, deadline: float) -> list[Verdict]:
    verdicts: list[Verdict] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("fuzzing", total=len(orders))

        def done(verdict: Verdict) -> None:
            verdicts.append(verdict)
            found = sum(one.kind is Kind.FINDING for one in verdicts)
            shown.update(task, advance=1, description=f"fuzzing, {found} found")

        run_cases(root, orders, done, workers=workers, deadline=deadline)
    return verdicts


class Report:
    """Verdicts counted, findings by cause, and which planted defects were found by which case."""

    def __init__(self, verdicts: list[Verdict], seconds: float, plants: dict[str, str] | None = None) -> None:
        self.plants = plants or {}
        self.seconds = seconds
        self.verdicts = verdicts
        self.counts: dict[str, Counter[Kind]] = defaultdict(Counter)
        self.findings: dict[tuple[str, str, str], list[Verdict]] = defaultdict(list)
        for verdict in verdicts:
            self.counts[verdict.campaign][verdict.kind] += 1
            if verdict.kind is Kind.FINDING:
                self.findings[verdict.group].append(verdict)

    def show(self, console: Console) -> None:
        """The table, then one line and one command for each cause."""
        rate = len(self.verdicts) / max(self.seconds, 1e-9)
        table = Table(
            "campaign",
            "cases",
            *(str(kind) for kind in Kind),
            title=f"{len(self.verdicts):,} cases, {rate:.1f} a second",
        )
        for name, counts in self.counts.items():
            table.add_row(name, *(f"{number:,}" for number in (counts.total(), *(counts[kind] for kind in Kind))))
        total = sum(self.counts.values(), Counter())
        table.add_section()
        table.add_row("all", *(f"{number:,}" for number in (total.total(), *(total[kind] for kind in Kind))))
        console.print(table)
        if self.plants:
            table = Table(
                "planted defect",
                "found by",
                title=f"{sum(map(bool, self.plants.values()))} of {len(self.plants)} found",
            )
            for name, by in self.plants.items():
                table.add_row(name, by or "nothing")
            console.print(table)
        for (finding, error, where), found in sorted(
            self.findings.items(), key=lambda item: (item[0][0], -len(item[1]))
        ):
            first = min(found, key=lambda one: one.case)
            console.print(
                f"{len(found)} x {finding}: {error or 'none raised'} in {where}",
                style="red",
                highlight=False,
                markup=False,
            )
            console.print(f"    {'; '.join(first.changes)}"[:300], highlight=False, markup=False)
            console.print(f"    {first.detail}"[:400], highlight=False, markup=False)
            console.print(f"    {first.command}", highlight=False, markup=False, soft_wrap=True)

    def to_json(self) -> dict[str, object]:
        return {
            "cases": len(self.verdicts),
            "seconds": round(self.seconds, 1),
            "campaigns": {name: {str(kind): counts[kind] for kind in Kind} for name, counts in self.counts.items()},
            "planted": self.plants,
            "findings": [
                {"finding": key[0], "error": key[1], "where": key[2], "count": len(found),
                    "command": found[0].command, "changes": found[0].changes, "detail": found[0].detail}
                for key, found in self.findings.items()
            ],
        }  # fmt: skip


def _show_case(verdict: Verdict) -> None:
    print(f"{verdict.campaign} case {verdict.case}, seed {verdict.seed}")
    for change in verdict.changes:
        print(f"  {change}")
    said = f"{verdict.kind}: {verdict.finding}" if verdict.finding else str(verdict.kind)
    print(f"verdict: {said}  ({verdict.seconds:.2f} s)")
    for name in ("error", "where", "detail"):
        if getattr(verdict, name):
            print(f"{name}: {getattr(verdict, name)}")
