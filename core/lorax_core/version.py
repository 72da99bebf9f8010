"""The version of lorax-core, on the lowest floor so that everything may ask for it."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
