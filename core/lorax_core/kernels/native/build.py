"""From a C++ source to a loaded library.

Decides how a source is compiled (once for each processor, compiler, flags, source and headers) and where the library is kept.
What is loaded is a private copy of the bytes that were checked, so nothing can come between. Knows nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from lorax_core.kernels.native.compiler import Compiler, find_compiler
from lorax_core.kernels.native.trust import file_problem, folder_problem
from lorax_core.progress import Progress, Report
from lorax_core.settings import Settings

# Sums may be reordered freely, which is what lets them be vectorised; NaN stays NaN.
FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
)
_HASH_BYTES = hashlib.sha256().digest_size
_MOST_BYTES = 64 * 2**20  # of a library; ours has some 20,000


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
        library, code = _built(source, settings.cache.expanduser() / "native")
        return Native(_load(library.name, code), str(library))
    # ValueError: a NUL in a path.
    except (OSError, RuntimeError, ValueError) as error:
        return Native(None, str(error))
    except MemoryError:
        return Native(None, "there is no memory left for it")


def sources_of(*names: str) -> list[Path]:
    """Core's own sources by their names."""
    return [Path(__file__).with_name(f"{name}.cpp") for name in names]


def compile_ahead(settings: Settings, sources: Iterable[Path], report: Report) -> None:
    """Compiles what the cache lacks, several at a time, which takes seconds each. What fails is left to `load_native`."""
    if not settings.native:
        return
    try:
        where = _library_folder(settings.cache.expanduser() / "native")
        missing = [source for source in sources if not where.library(source).exists()]
    except (OSError, RuntimeError, ValueError):
        return
    if not missing:
        return
    stage = "compiling native code, once"
    report(Progress(stage, 0, len(missing)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [pool.submit(_compile, where.compiler, source.resolve(), where.library(source)) for source in missing]
        for done, one in enumerate(as_completed(started), 1):
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                one.result()
            report(Progress(stage, done, len(missing)))


@dataclass(frozen=True, slots=True)
class _LibraryFolder:
    """Where libraries are kept, and the compiler that makes them."""

    folder: Path
    user: int
    compiler: Compiler
    version: bytes

    def library(self, source: Path) -> Path:
        # A library is made for the processor that made it, and a home may be shared by several.
        headers = [header.read_bytes() for header in sorted(source.parent.glob("*.h"))]
        key = (source.read_bytes(), *headers, " ".join(FLAGS).encode(), self.version, processor())
        return self.folder / f"{source.stem}-{hashlib.sha256(b'|'.join(key)).hexdigest()[:16]}.so"


def _library_folder(folder: Path) -> _LibraryFolder:
    """Raises RuntimeError or OSError when nothing can be compiled or kept there."""
    if not hasattr(os, "memfd_create"):
        raise RuntimeError("native code is loaded on Linux alone")
    make_private(folder)
    # Links are followed first: the checks hold for the folder that is opened in the end.
    folder, user = folder.resolve(), os.geteuid()
    # Before anything is read from there or written to it.
    _refuse(folder_problem(folder, user))
    compiler = find_compiler(user)
    return _LibraryFolder(folder, user, compiler, compiler.run("--version", folder=Path("/")))


def _built(source: Path, folder: Path) -> tuple[Path, bytes]:
    """The library and what it holds, compiled unless the cache has it; raises RuntimeError or OSError when there is none."""
    where = _library_folder(folder)
    library = where.library(source)
    code = _read(library, where.user)
    if code is None:
        _compile(where.compiler, source.resolve(), library)
        code = _read(library, where.user)
    if code is None:
        raise RuntimeError(f"{library} was cut short as soon as it was written: is the disk full?")
    return library, code


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise RuntimeError(f"native code is not loaded: {problem}")


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone, whatever the umask."""
    for place in reversed((folder, *folder.parents)):
        # Not mkdir(parents=True): that leaves the mode of those above to the umask.
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)


def _read(library: Path, user: int) -> bytes | None:
    """A whole library that only this user can have written; None when there is none, or it was cut short; else RuntimeError."""
    try:
        # No link, whose target could be anybody's; and no waiting for a pipe to be written to.
        number = os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RuntimeError(f"native code is not loaded: {error}: rm {library}") from error
    try:
        # Of the open file and not of its name, which may mean another one by now.
        status = os.fstat(number)
        _refuse(file_problem(library, status, user))
        with open(number, "rb", closefd=False) as file:
            data = file.read(min(status.st_size, _MOST_BYTES))
    finally:
        os.close(number)
    # It ends with the hash of what stands before: one cut short would kill the process when it is loaded.
    whole = hashlib.sha256(data[:-_HASH_BYTES]).digest() == data[-_HASH_BYTES:]
    return data if whole else None


def _load(name: str, code: bytes) -> ctypes.CDLL:
    """Loads code from memory, where nobody can change it between the check and the load."""
    import fcntl  # late: Windows has none

    number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(number, "wb", closefd=False) as file:
            file.write(code)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        # Left open for good: the loader knows libraries by their path, and would take the next of this number for it.
        return ctypes.CDLL(f"/proc/self/fd/{number}")
    except BaseException:
        os.close(number)
        raise


def _compile(compiler: Compiler, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        folder = Path(scratch)
        linked = folder / "code.so"
        # Linked on its own, without an OpenMP library: torch's is in the process already, and two would fight for the cores.
        compiler.run(*FLAGS, "-c", str(source), "-o", "code.o", folder=folder)
        compiler.run("-shared", "code.o", "-o", linked.name, folder=folder)
        with linked.open("r+b") as file:
            code = file.read()
            file.write(hashlib.sha256(code).digest())  # loaders ignore what follows the last section
            file.flush()
            os.fsync(file.fileno())
        linked.chmod(0o700)  # whatever the umask
        # Atomic: processes that start at once each build, and none sees half a library.
        os.replace(linked, library)


def processor() -> bytes:
    """What tells processors apart for which code is compiled differently: their names and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()
