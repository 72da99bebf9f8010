"""Who can have written what is about to be run.

Decides which folders, libraries and programs are safe to run code from: those that only this user and root can have written,
by the rule of ssh's StrictModes. Write access of any group counts as that of others, of the user's own too: others may be in
it. Knows nothing of compilers or of what a library computes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ROOT = 0


def folder_problem(folder: Path, user: int) -> str | None:
    """Why libraries in a resolved folder must not be loaded by a user id; None when only that user can have put them there."""
    found = folder.stat()
    if found.st_uid != user:
        return f"{folder} belongs to user {found.st_uid}, not to you: set LORAX_CACHE to a folder of your own"
    if found.st_mode & _OTHERS:
        return f"{folder} can be written to by other users: chmod 700 {folder}"
    return _above_problem(folder, user)


def file_problem(file: Path, found: os.stat_result, user: int) -> str | None:
    """Why an open file must not be loaded by a user id; None when it is a regular file that only that user can write to."""
    if not stat.S_ISREG(found.st_mode):
        return f"{file} is not a regular file: rm {file}"
    if found.st_uid != user:
        return f"{file} belongs to user {found.st_uid}, not to you: rm {file}"
    if found.st_mode & _OTHERS:
        return f"{file} can be written to by other users: rm {file}"
    return None


def program_problem(program: Path, user: int) -> str | None:
    """Why a program, or a folder of them, must not be used by a user id; None when only that user and root can change it."""
    try:
        for place in _links(program):
            resolved = place.parent.resolve() / place.name
            problem = _above_problem(resolved, user)
            if problem is None and not resolved.is_symlink():  # of a link, the folder decides
                problem = _writer_problem(resolved, user, sticky=False)
            if problem is not None:
                return problem
    except OSError as error:
        return str(error)
    return None


def _above_problem(place: Path, user: int) -> str | None:
    """Who may rename a folder above a place could put another in its place."""
    found = (_writer_problem(folder, user, sticky=True) for folder in place.parents)
    return next((problem for problem in found if problem is not None), None)


def _writer_problem(place: Path, user: int, *, sticky: bool) -> str | None:
    found = place.stat()
    if found.st_uid not in (_ROOT, user):
        return f"{place} belongs to user {found.st_uid}"
    # In a sticky folder others can rename only what is theirs.
    if found.st_mode & _OTHERS and not (sticky and found.st_mode & stat.S_ISVTX):
        return f"{place} can be written to by other users: chmod go-w {place}"
    return None


def _links(place: Path) -> list[Path]:
    """A path and what it leads to, link by link."""
    found = [place]
    while found[-1].is_symlink() and len(found) < 40:  # as many as Linux follows
        found.append(found[-1].parent / found[-1].readlink())
    return found
