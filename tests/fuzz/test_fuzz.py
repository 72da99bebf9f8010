"""Some dozens of cases over all campaigns, of one seed: nothing is found, and all four verdicts happen.

`make fuzz` runs tens of thousands; `CONTRIBUTING.md` says how.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fuzz.bases import build
from fuzz.campaigns import CAMPAIGNS, schedule
from fuzz.command import Report, main
from fuzz.judge import Attempt, CannotJudge, Wrong, difference, judge
from fuzz.pool import run_cases
from fuzz.verdicts import Finding, Kind, Verdict
from lorax_core.errors import RequestError

CASES = 60
SEED = 12
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def verdicts(root):
    found: list[Verdict] = []
    orders = [(name, SEED, case) for name, case in schedule(list(CAMPAIGNS), CASES)]
    run_cases(root, orders, lambda verdict: found.append(verdict), workers=1)
    return found


def test_nothing_is_found(verdicts):
    found = [f"{one.finding}: {one.detail}\n  {one.command}" for one in verdicts if one.kind is Kind.FINDING]

    assert not found, "\n".join(found)
    assert len(verdicts) == CASES


def test_every_campaign_says_something(verdicts):
    kinds = Counter(one.kind for one in verdicts)
    equal = {one.campaign for one in verdicts if one.kind is Kind.EQUAL}

    # A machine that refuses all it is given, or judges nothing, would find nothing either.
    assert {one.campaign for one in verdicts} == set(CAMPAIGNS)
    assert kinds[Kind.EQUAL] > CASES // 5
    assert kinds[Kind.REFUSED] > CASES // 5
    assert kinds[Kind.WEAK] < CASES // 4
    assert {"config", "adapter", "tensors", "request", "tokenizer", "constraint"} <= equal


def test_bases_are_the_same_files_in_every_process(root, tmp_path):
    code = "import sys, pathlib; from fuzz.bases import build; build(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])

    # Of another order in sets: this process has a random one, or 0.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=300, env=environment
    )

    here, there = files(root), files(tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name in here.keys() | there.keys() if here.get(name) != there.get(name)] == []


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ask(answer):
    def asked():
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return asked


def refer(answer, seeded=None):
    def referred(_answer, seed):
        found = seeded if seed and seeded is not None else answer
        if isinstance(found, BaseException):
            raise found
        return found

    return referred


SAME = {"x": [1.0, 2.0]}
HINTED = RequestError("no", hint="do this")


@pytest.mark.parametrize(
    ("attempt", "kind", "finding"),
    [
        (Attempt(ask(SAME), refer(SAME)), Kind.EQUAL, None),
        (Attempt(ask(SAME), refer({"x": [1.0, 2.1]})), Kind.FINDING, Finding.WRONG),
        (Attempt(ask(SAME), refer({"x": [1.0]})), Kind.FINDING, Finding.WRONG),
        (Attempt(ask(SAME), refer({"y": [1.0, 2.0]})), Kind.FINDING, Finding.WRONG),
        (Attempt(ask(SAME), refer({"x": [1.0, 2.1]}, {"x": [1.0, 2.2]})), Kind.WEAK, None),
        (Attempt(ask(SAME), refer({"x": [1.0, 2.1]}), refer({"x": [1.0, 2.5]})), Kind.WEAK, None),
        (Attempt(ask(SAME), refer({"x": [1.0, 2.1]}), refer({"x": [1.0, 2.1001]})), Kind.FINDING, Finding.WRONG),
        (Attempt(ask(SAME), refer(ValueError("no"))), Kind.WEAK, None),
        (Attempt(ask(SAME), refer(CannotJudge("no"))), Kind.WEAK, None),
        (Attempt(ask(SAME), refer(Wrong("no"))), Kind.FINDING, Finding.WRONG),
        (Attempt(ask({"x": [1.0, float("nan")]}), refer(SAME)), Kind.FINDING, Finding.NOT_FINITE),
        (Attempt(ask(SAME), refer(SAME), must_refuse="it lies outside"), Kind.FINDING, Finding.ACCEPTED),
        (Attempt(ask(HINTED), refer(SAME)), Kind.REFUSED, None),
        (Attempt(ask(HINTED), refer(SAME), same=True), Kind.FINDING, Finding.OVERSTRICT),
        (Attempt(ask(HINTED), refer(SAME), secrets=("this",)), Kind.FINDING, Finding.LEAK),
        (Attempt(ask(RequestError("no", hint=" ")), refer(SAME)), Kind.FINDING, Finding.NO_HINT),
        (Attempt(ask(RequestError("\ud800", hint="x")), refer(SAME)), Kind.FINDING, Finding.BARE),
        (Attempt(ask(KeyError("no")), refer(SAME)), Kind.FINDING, Finding.BARE),
        (Attempt(ask(KeyboardInterrupt()), refer(SAME)), Kind.FINDING, Finding.BARE),
        (Attempt(ask(SAME), refer(SAME), check=lambda: (Finding.CODE, "ran")), Kind.FINDING, Finding.CODE),
    ],
)
def test_the_oracle(attempt, kind, finding):
    outcome = judge(attempt)

    assert (outcome.kind, outcome.finding) == (kind, finding)


def test_an_answer_that_no_reference_judges_must_stay_the_same():
    answers = iter([{"x": [1.0]}, {"x": [2.0]}])

    outcome = judge(Attempt(lambda: next(answers), refer(CannotJudge("no"))))

    assert outcome.finding is Finding.UNSTEADY


def test_what_is_too_little_to_matter():
    assert difference({"x": [1.0, 1000.0]}, {"x": [1.5, 1000.0]}) is None
    assert difference({"x": [1.0]}, {"x": [1.5]}) == pytest.approx(1 / 3)
    assert difference({"x": ["a"]}, {"x": ["b"]}) == "x"


def test_a_case_is_repeated_by_the_command_that_is_printed(verdicts, capsys):
    case = next(one for one in verdicts if one.campaign == "tensors" and one.kind is Kind.REFUSED)
    variable, python, module, name, *arguments = case.command.split()

    code = main([*arguments, "--json"])

    assert (variable, python, module, name) == ("PYTHONPATH=tests", "python", "-m", "fuzz")
    assert code == 0
    assert json.loads(capsys.readouterr().out)["campaigns"] == {
        "tensors": {"refused": 1, "equal": 0, "weak": 0, "finding": 0}
    }


def test_findings_of_one_cause_are_one_group():
    found = [
        Verdict("config", 0, case, Kind.FINDING, Finding.BARE, "KeyError", "weights/loader.py:load") for case in (3, 5)
    ]

    report = Report([*found, Verdict("config", 0, 6, Kind.EQUAL)], seconds=1.0)

    assert [len(group) for group in report.findings.values()] == [2]
    assert report.counts["config"] == {Kind.FINDING: 2, Kind.EQUAL: 1}
