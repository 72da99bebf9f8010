"""Seeded mutation campaigns against everything that lorax-core reads of others.

`PYTHONPATH=tests python -m fuzz` runs them, `make fuzz` at length; `--campaign NAME --seed S --case N` repeats one case. A
case is made of its campaign, seed and number alone. Its verdict is one of:

- `refused`: a `LoraxError` with a hint.
- `equal`: an answer that is the reference's (transformers, PEFT, sentence-transformers, or for constraints an independent
  validator), or the unmutated answer where the mutation must not change it.
- `weak`: an answer that no reference judges, because it raises, is not determined by the files, or loses itself in rounding
  what the two differ by. Held only to be finite and the same when asked for again. Never counted as equal.
- `finding`: anything else. `verdicts.Finding` lists the classes.

After each case the worker's own engine must answer its probe as before.
"""

from __future__ import annotations

import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
if str(SUPPORT) not in sys.path:  # under pytest it is there already
    sys.path.append(str(SUPPORT))
