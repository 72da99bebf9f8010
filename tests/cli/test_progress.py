"""How far long work is, on a terminal."""

from __future__ import annotations

import io
import sys

from lorax_core.cli.progress import shown_progress
from lorax_core.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(report):
    report(Progress("reading weights", 0, 2_000_000_000, "B"))
    report(Progress("reading weights", 500_000_000, 2_000_000_000, "B"))
    report(Progress("trying kernels", 3))
    report(Progress("loading adapters", 1, 2))


def test_a_terminal_shows_stage_and_amount(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    with shown_progress() as report:
        work(report)

    assert "loading adapters" in shown.getvalue()
    assert "1 of 2" in shown.getvalue()


def test_bytes_are_shown_with_their_rate(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    with shown_progress() as report:
        report(Progress("reading weights", 500_000_000, 2_000_000_000, "B"))
        report(Progress("reading weights", 2_000_000_000, 2_000_000_000, "B"))

    assert "2.00 / 2.00 GB" in shown.getvalue()


def test_what_has_a_unit_is_shown_with_its_rate(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)

    with shown_progress() as report:
        for done in (512, 1024, 20_000):
            report(Progress("writing vectors.npy", done, 20_000, "lines"))

    assert "20,000 of 20,000 lines, " in shown.getvalue()
    assert " a second" in shown.getvalue()


def test_a_pipe_shows_nothing(capsys):
    with shown_progress() as report:
        work(report)

    assert capsys.readouterr() == ("", "")


def test_data_stays_on_stdout_while_a_bar_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())

    with shown_progress() as report:
        work(report)
        print("data")

    assert capsys.readouterr().out == "data\n"
