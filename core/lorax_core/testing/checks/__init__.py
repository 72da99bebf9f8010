"""All checks of the kit, in the order in which they run: what is cheap and fundamental first.

Decides that order, and no more. Each module beside this one holds the checks of one property.
"""

from __future__ import annotations

from lorax_core.testing.check import Check
from lorax_core.testing.checks import (
    adapters,
    cache,
    configs,
    declaration,
    dtypes,
    masking,
    numbers,
    packing,
    quantized,
    weights,
)

CHECKS: tuple[Check, ...] = (
    *declaration.CHECKS,
    *weights.CHECKS,
    *numbers.CHECKS,
    *configs.CHECKS,
    *packing.CHECKS,
    *cache.CHECKS,
    *masking.CHECKS,
    *adapters.CHECKS,
    *dtypes.CHECKS,
    *quantized.CHECKS,
)
