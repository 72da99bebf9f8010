"""Decides which text the small model learns from: prose that ships with Python.

The text is `pydoc_data.topics` and the docstrings of the standard library's sources, read with `ast` so that nothing
is imported.  Only paragraphs that look like English sentences are kept; code, grammar, tables and signatures are not.
A document is one topic or one source file.  A document is held out by the hash of its name, so the split never depends
on the order of files or on what other documents exist.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_PERCENT = 5
# Left out: what is no library of its own, and what repeats one sentence in many files or is about one toolkit only.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib"}
    | {"pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo"}
)
SKIPPED_FILES = frozenset({"turtle.py"})
MIN_WORDS = 10
MIN_PROSE_SHARE = 0.95

_TYPOGRAPHIC = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "-", "\u2014": "-", "\xa0": " "}
    | {"\u2026": "..."}
)
_MARKUP = (
    (re.compile(r"(?<=\w)-\n\s*(?=\w)"), "-"),  # a hyphenated word that a line break cut
    (re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`"), r"\1"),  # :meth:`name` and :ref:`title <label>`
    (re.compile(r"``?([^`]+)``?"), r"\1"),
    (re.compile(r"\*\*?([\w.][^*]*?)\*\*?"), r"\1"),
    (re.compile(r"\[\d+\]"), ""),
    (re.compile(r"::$"), ":"),
    (re.compile(r"(?<=[a-z])\.(?=[A-Z][a-z]+ [a-z])"), ". "),  # two sentences that a list item's end ran together
    (re.compile(r"\s+"), " "),
)
_NOT_PROSE = re.compile(r"::=|>>>|->|==|[|{}<>\\@#$%^~=]|\w+\([^)]*,[^)]*\)|_{3,}|https?:|\.\.\s|: .*: ")
_PLAIN = frozenset(" ,.'\"()-:;_")
_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["(]?[A-Z])')
_LIST_ITEM = re.compile(r"^(?:[*-]|\(?\w[.)])\s+")
_WORD = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True)
class Document:
    """One topic or one source file: its name and its paragraphs, each on a line of its own."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.paragraphs) + "\n"

    @property
    def is_topic(self) -> bool:
        return self.name.startswith("topics/")

    @property
    def held_out(self) -> bool:
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def words(text: str) -> list[str]:
    """The lower-cased words of a text, as the corpus share counts them."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut after each full stop that a capital follows."""
    return _SENTENCE_END.split(paragraph)


def read_documents() -> list[Document]:
    """Every document with some prose, in the order of names; a paragraph that occurs twice is kept once."""
    seen: set[str] = set()
    documents = []
    for name, texts in sorted([*_topics(), *_docstrings()]):
        kept = [p for p in (clean(raw) for text in texts for raw in _raw_paragraphs(text)) if p and p not in seen]
        paragraphs = tuple(dict.fromkeys(kept))
        seen.update(paragraphs)
        if paragraphs:
            documents.append(Document(name, paragraphs))
    return documents


def clean(raw: str) -> str | None:
    """The paragraph on one line and without markup, or None where it is not prose."""
    text = raw.translate(_TYPOGRAPHIC)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    text = _LIST_ITEM.sub("", text.strip())
    return text if _is_prose(text) else None


def _is_prose(text: str) -> bool:
    if not text.isascii() or _NOT_PROSE.search(text) or len(text.split()) < MIN_WORDS:
        return False
    if not text[0].isupper() or text[-1] not in ".:!?" or text.isupper():
        return False
    plain = sum(character.isalpha() or character in _PLAIN for character in text)
    return plain / len(text) >= MIN_PROSE_SHARE


def _raw_paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines; a list gives one block per item."""
    for block in re.split(r"\n\s*\n", text):
        yield from re.split(r"\n(?=\s*(?:[*-]|\d+[.)])\s)", block)


def _topics() -> Iterator[tuple[str, list[str]]]:
    for name in sorted(topics):
        yield f"topics/{name}", [topics[name]]


def _docstrings() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for file in sorted(files):
            if file.endswith(".py") and file not in SKIPPED_FILES:
                path = Path(folder, file)
                yield f"stdlib/{path.relative_to(root).as_posix()}", _docstrings_of(path)


def _docstrings_of(path: Path) -> list[str]:
    """The docstrings of one source file in source order."""
    tree = ast.parse(path.read_bytes())
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]
