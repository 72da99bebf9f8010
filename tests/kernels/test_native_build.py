"""Which libraries are loaded: those that nobody else can have written."""

from __future__ import annotations

import os
import shutil

import pytest

from lorax_core.kernels.native import build
from lorax_core.kernels.native.build import folder_problem, library_problem, load_native
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


@pytest.mark.parametrize("kind", ["a link", "writable by all", "writable by the group", "a folder"])
def test_a_library_that_another_may_have_put_there_is_not_loaded(source, tmp_path, mark, kind):
    library, evil = made(source, tmp_path / "cache"), planted(tmp_path)
    library.unlink()
    if kind == "a link":
        library.symlink_to(evil)
    elif kind == "a folder":
        library.mkdir()
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

    assert "not to you" in library_problem(library, stranger)
    assert "not to you" in folder_problem(library.parent, stranger)
    assert library_problem(library, os.geteuid()) is None
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


def test_nothing_is_loaded_below_a_folder_that_a_foreign_group_can_write_to(source, tmp_path):
    cache = tmp_path / "cache"
    made(source, cache)
    try:
        os.chown(cache, -1, os.getegid() + 1)
    except PermissionError:
        pytest.skip("only root may give a folder to a foreign group")
    cache.chmod(0o770)

    found = load_native(source, Settings(cache=cache))

    assert found.library is None
    assert f"chmod go-w {cache}" in found.reason


def test_another_processor_has_another_library(source, tmp_path, monkeypatch):
    first = made(source, tmp_path / "cache")
    monkeypatch.setattr(build, "_processor", lambda: b"another")

    found = load_native(source, Settings(cache=tmp_path / "cache"))

    assert found.library.answer() == 42
    assert found.reason != str(first)
