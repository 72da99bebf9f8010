"""The lists in `docs/cli.md`, generated from the help texts: `python -m lorax_core.cli.manual docs/cli.md` makes them again.

Decides what the page says of a subcommand and of its flags. Knows nothing that `--help` does not say; the text around the
lists is the page's own, and a test compares the committed page with what is generated here.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, get_args

import typer

from lorax_core.cli.loading import LOADING_PANEL
from lorax_core.cli.main import app

_LISTS: Final = re.compile(r"(?<=<!-- commands -->\n).*?(?=<!-- end -->)", re.DOTALL)
_UNSAID: Final = frozenset({"help", "install_completion", "show_completion"})
"""Flags that every command has, or the command as a whole: the prose says it once."""
_TYPES: Final = {int: "N", float: "NUMBER", str: "TEXT"}


def with_commands(page: str) -> str:
    """The page with its lists of subcommands made again."""
    text = "\n".join(_lists())
    return _LISTS.sub(lambda _: f"\n{text}\n", page)


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every subcommand that does something, with its words: `adapters merge`, say. Hidden ones are left out."""
    if not hasattr(command, "commands"):
        yield " ".join(words), command
        return
    for name in command.commands:
        below = command.get_command(None, name)
        if not below.hidden:
            yield from leaves(below, (*words, name))


def _lists() -> Iterator[str]:
    commands = list(leaves(typer.main.get_command(app)))
    loading = next(_of_panel(command, LOADING_PANEL) for _, command in commands if _of_panel(command, LOADING_PANEL))
    yield "### Flags that load a model\n"
    yield "Those that come with every subcommand that loads one.\n"
    yield from _table("Flag", "Default", "Meaning", rows=map(_flag, loading))
    for words, command in commands:
        yield f"### lorax {words}\n"
        yield from ["```text", " ".join(["lorax", words, *_usage(command)]), "```\n"]
        yield f"{_plain(command.help or command.callback.__doc__ or '')}\n"
        said = [one for one in command.params if one.name not in _UNSAID]
        arguments = [one for one in said if one.param_type_name == "argument"]
        flags = [one for one in said if one.param_type_name == "option" and one.rich_help_panel != LOADING_PANEL]
        if arguments:
            yield from _table("Argument", "Meaning", rows=((f"`{_argument(one)}`", _help(one)) for one in arguments))
        if flags:
            yield from _table("Flag", "Default", "Meaning", rows=map(_flag, flags))
        if _of_panel(command, LOADING_PANEL):
            yield "And the [flags that load a model](#flags-that-load-a-model).\n"


def _of_panel(command: Any, panel: str) -> list[Any]:
    return [one for one in command.params if getattr(one, "rich_help_panel", None) == panel]


def _usage(command: Any) -> Iterator[str]:
    for one in command.params:
        if one.param_type_name == "argument":
            yield _argument(one) if one.required else f"[{_argument(one)}]"
        elif one.required:
            yield f"{one.opts[0]} {_values(one)}"
    yield "[OPTIONS]"


def _argument(one: Any) -> str:
    name = one.metavar or str(one.name).upper()
    return f"{name}..." if one.nargs != 1 and not name.endswith("...") else name


def _flag(one: Any) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    values = _values(one)
    if values:
        names = f"{names[:-1]} {values}`"
    default = one.default.value if isinstance(one.default, enum.Enum) else one.default
    if isinstance(one.show_default, str):  # that of the Python interface, which the flag leaves to it
        default = one.show_default
    if default is True and one.secondary_opts:
        default = one.opts[0]
    shown = "required" if one.required else "" if default in (None, False, (), []) else f"`{default}`"
    return names, shown, _help(one)


def _values(one: Any) -> str:
    """What a flag takes: its name for it, its choices, or its type; nothing for a switch."""
    if one.is_flag:
        return ""
    if one.metavar:
        return str(one.metavar)
    if one.type_descriptor.is_choice:
        return "|".join(str(choice) for choice in one.type_descriptor.choices)
    annotation = one.type_descriptor.annotation
    kind = next(iter(get_args(annotation)), annotation)  # of a list, what is in it
    return _TYPES.get(kind) or str(kind.__name__).upper()


def _help(one: Any) -> str:
    return _plain(one.help or "").replace("\n", " ")


def _plain(text: str) -> str:
    """A help text without typer's markup."""
    return (
        inspect.cleandoc(re.sub(r"\[/?(?:bold|italic|dim|red|green|cyan|yellow)\]", "", text))
        .partition("\f")[0]
        .strip()
    )


def _table(*heads: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(with_commands(page.read_text(encoding="utf-8")), encoding="utf-8")
