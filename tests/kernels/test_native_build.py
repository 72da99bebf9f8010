"""Which libraries are loaded: those that nobody else can have written."""

from __future__ import annotations

import os
import resource
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorax_core.kernels.native import build, compiler
from lorax_core.kernels.native.build import compile_ahead, load_native, sources_of
from lorax_core.kernels.native.trust import file_problem, folder_problem
from lorax_core.settings import Settings

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler is installed")

RIGHT = 'extern "C" int answer() { return 42; }'
PLANTED = """
#include <cstdlib>
#include <cstdio>
__attribute__((constructor)) static void run() { fclose(fopen(getenv("PLANTED_MARK"), "w")); }
extern "C" int answer() { return 13; }
"""


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "answer.cpp"
    file.write_text(RIGHT)
    return file


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that a planted library makes as soon as it is loaded."""
    monkeypatch.setenv("PLANTED_MARK", str(tmp_path / "it ran"))
    return tmp_path / "it ran"


def made(source, cache):
    """The one library that the cache holds after a load."""
    assert load_native(source, Settings(cache=cache)).library is not None
    (found,) = (cache / "native").glob("*.so")
    return found


def planted(tmp_path):
    evil = tmp_path / "evil.cpp"
    evil.write_text(PLANTED)
    library = made(evil, tmp_path / "elsewhere")
    (tmp_path / "it ran").unlink()
    return library


def test_a_source_is_compiled_once_and_can_be_called(source, tmp_path):
    first = load_native(source, Settings(cache=tmp_path / "cache"))
    library = made(source, tmp_path / "cache")
    before = library.stat().st_mtime_ns

    second = load_native(source, Settings(cache=tmp_path / "cache"))

    assert first.library.answer() == second.library.answer() == 42
    assert first.reason == str(library)
    assert library.stat().st_mtime_ns == before
    assert list((tmp_path / "cache/native").iterdir()) == [library]
    assert (tmp_path / "cache/native").stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o777 == 0o700


def test_another_source_is_another_library(source, tmp_path):
    load_native(source, Settings(cache=tmp_path / "cache"))
    source.write_text(RIGHT.replace("42", "43"))

    assert load_native(source, Settings(cache=tmp_path / "cache")).library.answer() == 43


def test_another_header_is_another_library(source, tmp_path):
    header = source.with_name("number.h")
    header.write_text("#define NUMBER 42")
    source.write_text('#include "number.h"\n' + RIGHT.replace("42", "NUMBER"))
    before = load_native(source, Settings(cache=tmp_path / "cache")).library.answer()
    header.write_text("#define NUMBER 43")

    after = load_native(source, Settings(cache=tmp_path / "cache")).library.answer()

    assert (before, after) == (42, 43)


def replace(evil, library):
    library.unlink()  # never written over: this process may have it mapped
    shutil.copy(evil, library)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(source, tmp_path, mark, mode):
    library = made(source, tmp_path / "cache")
    replace(planted(tmp_path), library)
    library.parent.chmod(mode)

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert not mark.exists()
    assert f"chmod 700 {library.parent}" in found.reason


def test_nothing_is_loaded_below_a_folder_that_others_can_write_to(source, tmp_path, mark):
    library = made(source, tmp_path / "cache")
    replace(planted(tmp_path), library)
    (tmp_path / "cache").chmod(0o777)

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert not mark.exists()
    assert f"chmod go-w {tmp_path / 'cache'}" in found.reason
    (tmp_path / "cache").chmod(0o1777)  # sticky: others cannot rename what is not theirs
    assert folder_problem(tmp_path / "cache/native", os.geteuid()) is None


@pytest.mark.parametrize("kind", ["a link", "writable by all", "writable by the group", "a folder", "a pipe"])
def test_a_library_that_another_may_have_put_there_is_not_loaded(source, tmp_path, mark, kind):
    library, evil = made(source, tmp_path / "cache"), planted(tmp_path)
    library.unlink()
    if kind == "a link":
        library.symlink_to(evil)
    elif kind == "a folder":
        library.mkdir()
    elif kind == "a pipe":
        os.mkfifo(library, 0o700)
    else:
        shutil.copy(evil, library)
        library.chmod(0o702 if "all" in kind else 0o720)

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert not mark.exists()
    assert str(library) in found.reason
    assert "rm " in found.reason


def test_what_belongs_to_another_user_is_not_loaded(source, tmp_path):
    library = made(source, tmp_path / "cache")
    stranger = os.geteuid() + 1

    assert "not to you" in file_problem(library, library.stat(), stranger)
    assert "not to you" in folder_problem(library.parent, stranger)
    assert file_problem(library, library.stat(), os.geteuid()) is None
    assert folder_problem(library.parent, os.geteuid()) is None


def test_a_folder_behind_a_link_is_judged_by_where_it_is(source, tmp_path, mark):
    library = made(source, tmp_path / "open" / "cache")
    replace(planted(tmp_path), library)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open/cache")

    found = load_native(source, Settings(cache=tmp_path / "link"))

    assert found.library is None
    assert not mark.exists()


def test_a_source_that_does_not_compile_says_why(source, tmp_path):
    source.write_text("this is no C++")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert "failed" in found.reason


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_library_that_was_cut_short_is_compiled_again(source, tmp_path, kept):
    library = made(source, tmp_path / "cache")
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(whole[:kept])
    library.chmod(0o700)

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library.answer() == 42
    assert library.stat().st_size == len(whole)


def test_nothing_is_loaded_below_a_folder_that_a_group_can_write_to(source, tmp_path, mark):
    library = made(source, tmp_path / "cache")
    replace(planted(tmp_path), library)
    (tmp_path / "cache").chmod(0o770)  # of the user's own group: who else is in it is not known

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert not mark.exists()
    assert f"chmod go-w {tmp_path / 'cache'}" in found.reason


def test_another_processor_has_another_library(source, tmp_path, monkeypatch):
    first = made(source, tmp_path / "cache")
    monkeypatch.setattr(build, "processor", lambda: b"another")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library.answer() == 42
    assert found.reason != str(first)


def test_what_is_loaded_is_a_copy_that_nobody_can_change(source, tmp_path):
    library = made(source, tmp_path / "cache")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    mapped = Path("/proc/self/maps").read_text()
    assert found.library.answer() == 42
    assert str(library) not in mapped
    assert f"/memfd:{library.name}" in mapped


def test_folders_are_private_whatever_the_umask(source, tmp_path):
    before = os.umask(0)
    try:
        found = load_native(source, Settings(cache=tmp_path / "not" / "there" / "cache"))
    finally:
        os.umask(before)

    made_now = [tmp_path / "not", *(tmp_path / "not").rglob("*")]
    assert found.library.answer() == 42
    assert {oct(path.stat().st_mode & 0o777) for path in made_now} == {"0o700"}


def test_a_path_that_is_none_is_a_reason(source):
    assert load_native(source, Settings(cache=Path("a\0b"))).library is None


# --- the compiler ---


def program(file, text):
    file.parent.mkdir(mode=0o755, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o700)
    return file


@pytest.mark.parametrize("how", ["folder of others", "folder of the group", "file of others", "relative", "empty"])
def test_a_compiler_that_others_can_have_put_on_the_path_is_not_run(source, tmp_path, mark, monkeypatch, how):
    evil = program(tmp_path / "bin/c++", f"touch '{mark}'\nexec g++ \"$@\"")
    evil.parent.chmod({"folder of others": 0o777, "folder of the group": 0o775}.get(how, 0o755))
    evil.chmod(0o777 if how == "file of others" else 0o755)
    monkeypatch.chdir(evil.parent)
    first = {"relative": ".", "empty": ""}.get(how, str(evil.parent))
    monkeypatch.setenv("PATH", f"{first}:{os.environ['PATH']}")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library.answer() == 42
    assert not mark.exists()


def test_a_link_to_a_compiler_is_judged_by_where_it_leads(source, tmp_path, mark, monkeypatch):
    evil = program(tmp_path / "open/real", f"touch '{mark}'")
    evil.parent.chmod(0o777)
    (tmp_path / "bin").mkdir(mode=0o755)
    (tmp_path / "bin/c++").symlink_to(evil)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert not mark.exists()
    assert f"chmod go-w {evil.parent}" in found.reason


@pytest.mark.parametrize("name", ["as", "ld"])
def test_the_compilers_own_programs_are_not_taken_from_the_working_folder(source, tmp_path, mark, monkeypatch, name):
    evil = program(tmp_path / f"work/{name}", f"touch '{mark}'\nexit 1")
    monkeypatch.chdir(evil.parent)
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}")
    monkeypatch.setenv("COMPILER_PATH", ":")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert not mark.exists()
    assert found.library.answer() == 42


def test_headers_are_not_taken_from_the_working_folder(source, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/cstdint").write_text("#define answer() answer() { return 13; } int other()")
    source.write_text(f"#include <cstdint>\n{RIGHT}")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("CPATH", ":")

    assert load_native(source, Settings(cache=tmp_path / "cache")).library.answer() == 42


def test_the_variable_cxx_is_not_obeyed(source, tmp_path, mark, monkeypatch):
    evil = program(tmp_path / "bin/evil", f"touch '{mark}'")
    monkeypatch.setenv("CXX", f"{evil} --with arguments; touch '{mark}'")

    assert load_native(source, Settings(cache=tmp_path / "cache")).library.answer() == 42
    assert not mark.exists()


def ends(number):
    """Whether a process has ended, or does soon: a signal that kills takes a moment to arrive."""
    try:
        process = os.pidfd_open(number)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 30)[0])
    finally:
        os.close(process)


def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(source, tmp_path, monkeypatch):
    program(tmp_path / "bin/c++", f"sleep 1000 & echo $! > '{tmp_path}/child'\nwait")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(compiler, "SECONDS", 1)

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert "took longer than 1 s" in found.reason
    assert ends(int((tmp_path / "child").read_text()))


def test_a_compiler_that_prints_without_end_is_ended(source, tmp_path, monkeypatch):
    program(tmp_path / "bin/c++", "exec yes")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert "prints without end" in found.reason


def test_messages_of_a_compiler_need_not_be_utf_8(source, tmp_path, monkeypatch):
    program(tmp_path / "bin/c++", "[ \"$1\" = --version ] && exit\nprintf 'caf\\351: no such file'\nexit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library is None
    assert "no such file" in found.reason


ELSEWHERE = """
import resource, sys
from pathlib import Path
from lorax_core.kernels.native.build import compile_ahead, load_native, sources_of
from lorax_core.settings import Settings
source, cache, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
found = load_native(source, Settings(cache=cache))
print(found.reason if found.library is None else found.library.answer())
"""


def elsewhere(source, cache, most=resource.RLIM_INFINITY):
    """A process that loads a source and may write files of so many bytes."""
    command = [sys.executable, "-c", ELSEWHERE, str(source), str(cache), str(most)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_build_at_once_all_have_the_library(source, tmp_path):
    processes = [elsewhere(source, tmp_path / "cache") for _ in range(4)]

    answers = [process.communicate(timeout=120)[0].strip() for process in processes]

    assert answers == ["42"] * 4
    assert len(list((tmp_path / "cache/native").iterdir())) == 1


@pytest.mark.parametrize("most", [100, 8000])
def test_a_disk_without_room_is_a_reason_and_leaves_nothing(source, tmp_path, most):
    process = elsewhere(source, tmp_path / "cache", most)

    said, _ = process.communicate(timeout=120)

    assert process.returncode == 0
    assert said.strip() != "42"
    assert list((tmp_path / "cache/native").iterdir()) == []


def test_what_the_cache_lacks_is_compiled_ahead_and_then_loaded_as_it_is(source, tmp_path):
    other, broken = tmp_path / "other.cpp", tmp_path / "broken.cpp"
    other.write_text(RIGHT)
    broken.write_text("no C++")
    settings, heard = Settings(cache=tmp_path / "cache"), []

    compile_ahead(settings, [source, other, broken], heard.append)

    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache/native").glob("*.so")}
    assert [(one.done, one.total) for one in heard] == [(done, 3) for done in range(4)]
    assert "broken.cpp" in load_native(broken, settings).reason
    assert [load_native(one, settings).library.answer() for one in (source, other)] == [42, 42]
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache/native").glob("*.so")} == kept


def test_nothing_is_reported_where_all_is_compiled_or_nothing_may_be(source, tmp_path):
    settings, heard = Settings(cache=tmp_path / "cache"), []
    made(source, settings.cache)

    compile_ahead(settings, [source], heard.append)
    compile_ahead(Settings(cache=tmp_path / "other", native=False), [source], heard.append)

    assert heard == []
    assert not (tmp_path / "other").exists()


def test_sources_of_core_are_there():
    names = ("attention", "elementwise", "low_rank", "quantized", "sampling", "skinny")

    assert [source.name for source in sources_of(*names) if source.is_file()] == [f"{name}.cpp" for name in names]
