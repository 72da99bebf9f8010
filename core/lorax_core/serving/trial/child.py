"""The process in which trials run: what crashes or hangs here takes no engine with it.

Decides the lines that it writes: `{"begin": i}` before each trial and `{"done": i, "problem": ...}` after it, so that whoever
reads them knows which trial was the last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TextIO

from lorax_core.serving.trial.attention import try_attention
from lorax_core.serving.trial.graphs import try_graphs
from lorax_core.serving.trial.kernels import try_elementwise, try_lora
from lorax_core.serving.trial.spec import TRIALS, Trial

_TRIALS: dict[str, Callable[[Any], str | None]] = {
    "attention": try_attention,
    "lora": try_lora,
    "elementwise": try_elementwise,
    "graphs": try_graphs,
}


def run_trial(trial: Trial) -> str | None:
    """What goes wrong in a trial, None when nothing does."""
    try:
        return _TRIALS[trial.kind](trial)
    except Exception as error:  # whatever a kernel raises is a reason not to use it
        return f"{type(error).__name__}: {error}"[:2000]


def main(orders: TextIO, answers: TextIO) -> None:
    """Runs the trials that `orders` lists as JSON."""
    for number, trial in enumerate(TRIALS.validate_json(orders.read())):
        _say(answers, begin=number)
        _say(answers, done=number, problem=run_trial(trial))


def _say(answers: TextIO, **line: Any) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


if __name__ == "__main__":
    # Compilers and libraries print; only what this process says may go to the pipe.
    own, sys.stdout = sys.stdout, sys.stderr
    main(sys.stdin, own)
