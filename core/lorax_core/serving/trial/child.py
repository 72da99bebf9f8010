"""The process in which a trial runs: what crashes or hangs here takes no engine with it.

Decides that nothing but the verdict reaches the process that waits for it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from lorax_core.serving.trial.attention import try_attention
from lorax_core.serving.trial.graphs import try_graphs
from lorax_core.serving.trial.kernels import try_elementwise, try_lora
from lorax_core.serving.trial.spec import TRIAL, Trial

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


def main(order: str, answers: TextIO) -> None:
    """Runs the trial that `order` states as JSON, and writes `{"problem": ...}`."""
    json.dump({"problem": run_trial(TRIAL.validate_json(order))}, answers)
    answers.flush()


if __name__ == "__main__":
    # Compilers and libraries print, below Python too: what is written to file 1 goes to stderr from here on.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin.read(), own)
