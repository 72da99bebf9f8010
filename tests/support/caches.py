"""A cache folder of its own for a test: nothing was tried, loaded or fetched in it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorax_core.kernels.native.build import make_private
from lorax_core.settings import Settings


def fresh_cache(folder: Path) -> str:
    """Makes `folder` a cache with nothing but the native code that this machine has compiled: that takes seconds."""
    make_private(folder)
    compiled = Settings().cache.expanduser() / "native"
    if compiled.is_dir():
        make_private(folder / "native")
        for library in compiled.glob("*.so"):
            shutil.copy2(library, folder / "native")
    return str(folder)
