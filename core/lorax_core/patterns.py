"""Regular expressions that come from files.

Decides that matching one takes time in proportion to its length: Python's own engine can take for ever over twenty
characters, and holds the interpreter's lock meanwhile. RE2 cannot, and in return knows neither look-around nor
back-references; an expression with them is refused.
"""

from __future__ import annotations

from typing import Final

import re2

from lorax_core.errors import LoraxError

LENGTH: Final = 4_000
"""Characters of the longest expression that is read; the longest that fine-tuning tools write has about 600."""
_OPTIONS: Final = re2.Options()
_OPTIONS.max_mem = 2**20  # bytes that one compiled expression may take
_OPTIONS.log_errors = False  # they are raised; the library would print them too


class UntrustedPattern:
    """An expression from a file, compiled. `source` says in errors where it stands, for example "alpha_pattern of FILE".

    Raises `kind` for an expression that is too long, not valid, or not one that RE2 can match.
    """

    def __init__(self, expression: str, source: str, kind: type[LoraxError]) -> None:
        if len(expression) > LENGTH:
            raise kind(
                f"{source} has an expression of {len(expression):,} characters; at most {LENGTH:,} are read",
                hint="name the modules in a list",
            )
        try:
            self._compiled = re2.compile(expression, options=_OPTIONS)
        except (re2.error, UnicodeEncodeError) as error:
            cause = error.args[0] if error.args else error
            said = cause.decode(errors="replace") if isinstance(cause, bytes) else error
            raise kind(
                f"{source} has {expression!r:.120}, which is not supported as a regular expression: {said}",
                hint="look-around and back-references are not supported: name the modules in a list instead",
            ) from error

    def fullmatch(self, text: str) -> bool:
        """Whether it matches the whole of `text`."""
        return self._compiled.fullmatch(text) is not None

    def group(self, text: str, name: str) -> str | None:
        """What the group of this name holds in a match of the whole of `text`; None without one."""
        found = self._compiled.fullmatch(text)
        return None if found is None else found.group(name)
