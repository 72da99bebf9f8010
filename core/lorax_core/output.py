"""A folder that is there whole or not at all.

Decides how results are written: into a new folder beside the final one, which is renamed when everything is in it. Knows
nothing of what is written.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lorax_core.errors import LoraxError


@contextlib.contextmanager
def new_folder(out: str | Path, kind: type[LoraxError], *, overwrite: bool | None = None) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end; an error on the way leaves `out` as it was.

    Raises `kind` when `out` holds anything and may not be overwritten; with None, no caller could have allowed it.
    """
    final = Path(out).absolute()
    check_free(final, kind, overwrite)
    mark = uuid.uuid4().hex[:8]
    # Beside `out`, not in /tmp: a rename is atomic only within one file system.
    fresh, old = (final.with_name(f".{final.name}.{kind}-{mark}") for kind in ("new", "old"))
    try:
        fresh.mkdir(parents=True)
        yield fresh
        check_free(final, kind, overwrite)  # writing may take long
        if final.exists():
            final.rename(old)
        try:
            fresh.rename(final)
        except OSError:
            # Put back what was there: the caller is promised an unchanged `out` on failure.
            if old.exists():
                old.rename(final)
            raise
    except (OSError, SafetensorError) as error:
        raise kind(
            f"{out} cannot be written: {error}", hint="give a folder that you may write to, on a disk with room"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)


def refuse_inputs_inside(out: Path, inputs: Iterable[str | Path], kind: type[LoraxError]) -> None:
    """Raise `kind` when replacing `out` would delete a folder that is read from."""
    for folder in inputs:
        if Path(folder).resolve().is_relative_to(out.resolve()):
            raise kind(
                f"{out} holds {folder}, which is read from, and would be replaced with all that is in it",
                hint="give a folder of its own for the result",
            )


def check_free(out: Path, kind: type[LoraxError], overwrite: bool | None = None) -> None:
    """Raise `kind` when `out` is a file, or a folder that holds something and may not be overwritten."""
    # A name that is too long, or none at all.
    try:
        taken = out.exists() and not out.is_dir()
    except (OSError, ValueError) as error:
        cause = f"{type(error).__name__}: {error!s:.200}"
        raise kind(f"{str(out)!r:.200} cannot be written: {cause}", hint="give another name") from error
    if taken:
        raise kind(f"{out} is a file; a folder is written", hint="give another name")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        allow = "" if overwrite is None else ", or overwrite=True (--overwrite)"
        raise kind(f"{out} holds files already", hint=f"give another folder{allow}")
