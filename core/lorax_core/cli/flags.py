"""Flags that several commands have in common, given to a command by a decorator.

Decides how they get into a command's signature, from which typer makes its help. Knows nothing of what they mean.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import typer

from lorax_core.errors import listed


def with_flags(
    command: Callable[..., None],
    keyword: str,
    flags: Mapping[str, Any],
    read: Callable[[typer.Context, dict[str, Any]], Any],
) -> Callable[..., None]:
    """A command with further flags, annotations by name. What `read` makes of those given is passed as one keyword argument."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name not in ("context", keyword)]
    if clash := {parameter.name for parameter in own} & flags.keys():
        raise TypeError(f"{command.__name__} has {listed(sorted(clash))} already")
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in flags.items()
    ]
    wants_context = "context" in signature.parameters

    @functools.wraps(command)
    def flagged(context: typer.Context, **given: Any) -> None:
        found = read(context, {name: given.pop(name) for name in flags})
        if wants_context:
            given["context"] = context
        command(**given, **{keyword: found})

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    # Those that a decorator below added, or adds above, are keywords; a help page has them in this order.
    parameters = sorted([context, *own, *added], key=lambda one: one.kind)
    flagged.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flagged.__annotations__ = {one.name: one.annotation for one in parameters}
    del flagged.__wrapped__  # whose signature typer would read instead
    return flagged
