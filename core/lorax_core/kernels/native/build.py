"""From a C++ source to a loaded library.

Decides how a source is compiled (once for each processor, compiler, flags and source), where the library is kept, and whether
the folder and the library are safe to load from: code in a place that another user can write to is never loaded. Knows
nothing of what a library computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorax_core.settings import Settings

# Sums may be reordered freely, which is what lets them be vectorised; NaN stays NaN.
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 120  # seconds
_HASH_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Native:
    """A loaded library and where it lies, or None and why there is none."""

    library: ctypes.CDLL | None
    reason: str


def load_native(source: Path, settings: Settings) -> Native:
    """The library of a source, compiled unless the cache has it. Never raises: without one, `reason` says what to do."""
    if not settings.native:
        return Native(None, "LORAX_NATIVE is off")
    try:
        library = _built(source, settings.cache.expanduser() / "native")
        return Native(ctypes.CDLL(str(library)), str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return Native(None, str(error))


def folder_problem(folder: Path, user: int) -> str | None:
    """Why libraries in a resolved folder must not be loaded by a user id; None when only that user can have put them there.

    The folder must be the user's, and no other user may write to it. A user who may rename a folder above it could put another
    in its place, so those must belong to the user or to root, and no other user may write to them unless they are sticky.
    """
    found = folder.stat()
    if found.st_uid != user:
        return f"{folder} belongs to user {found.st_uid}, not to you: set LORAX_CACHE to a folder of your own"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written to by other users: chmod 700 {folder}"
    for above in folder.parents:
        found = above.stat()
        if found.st_uid not in (0, user):
            return f"{above} belongs to user {found.st_uid}: set LORAX_CACHE to a folder below one of your own"
        foreign_group = found.st_mode & stat.S_IWGRP and found.st_gid not in (0, os.getegid())
        if (found.st_mode & stat.S_IWOTH or foreign_group) and not found.st_mode & stat.S_ISVTX:
            return f"{above} can be written to by other users: chmod go-w {above}"
    return None


def library_problem(library: Path, user: int) -> str | None:
    """Why a file must not be loaded by a user id; None when it is a regular file that only that user can have written."""
    # lstat: a link is refused as such, since its target could be exchanged after the check.
    found = library.lstat()
    if not stat.S_ISREG(found.st_mode):
        return f"{library} is no regular file: rm {library}"
    if found.st_uid != user:
        return f"{library} belongs to user {found.st_uid}, not to you: rm {library}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{library} can be written to by other users: rm {library}"
    return None


def _built(source: Path, folder: Path) -> Path:
    """The library, compiled unless the cache has it; raises RuntimeError or OSError with the reason when there is none."""
    if not hasattr(os, "geteuid"):
        raise RuntimeError("the owner of files cannot be checked on this system")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Links are followed first: the checks hold for the folder that is opened in the end.
    folder = folder.resolve()
    user = os.geteuid()
    # Before anything is read from there or written to it.
    problem = folder_problem(folder, user)
    if problem is not None:
        raise RuntimeError(f"native code is not loaded: {problem}")
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"none of the compilers {', '.join(_COMPILERS)} is installed")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_TIMEOUT).stdout
    # A library is made for the processor that made it, and a home may be shared by several.
    key = (source.read_bytes(), " ".join(_FLAGS).encode(), version, _processor())
    library = folder / f"{source.stem}-{hashlib.sha256(b'|'.join(key)).hexdigest()[:16]}.so"
    if os.path.lexists(library):
        problem = library_problem(library, user)
        if problem is not None:
            raise RuntimeError(f"native code is not loaded: {problem}")
        if _is_whole(library):
            return library
    _compile(compiler, source, library)
    return library


def _is_whole(library: Path) -> bool:
    """Whether a library ends with the hash of what stands before: one cut short would kill the process when it is loaded."""
    data = library.read_bytes()
    return hashlib.sha256(data[:-_HASH_BYTES]).digest() == data[-_HASH_BYTES:]


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        compiled, linked = Path(scratch) / "code.o", Path(scratch) / "code.so"
        # Linked on its own, without an OpenMP library: torch's is in the process already, and two would fight for the cores.
        for command in (
            [compiler, *_FLAGS, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-400:]}")
        with linked.open("r+b") as file:
            code = file.read()
            file.write(hashlib.sha256(code).digest())  # loaders ignore what follows the last section
            file.flush()
            os.fsync(file.fileno())
        linked.chmod(0o700)  # whatever the umask
        # Atomic: processes that start at once each build, and none sees half a library.
        os.replace(linked, library)


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
