"""What errors say at a command line, where they were written for those who call from Python.

Decides which names of options are flags there. Knows nothing of what failed.
"""

from __future__ import annotations

import re
from typing import Final

from lorax_core.errors import LoraxError

_HELP: Final = re.compile(r"help\(lorax_core[.\w]*\) says what each option takes")
_FLAGS: Final = "device|dtype|density|logprobs|pooling|prompt|quantize|task|threads|truncate"
# In order: a flag's name without a value comes last.
_NAMES: Final = tuple(
    (re.compile(pattern), flag)
    for pattern, flag in (
        (r"""\badapters=\{["']NAME["']: ["']?(FOLDER|SOURCE)["']?\}""", r"--adapter NAME=\1"),
        (rf"""\b({_FLAGS})=(["']?)([\w.-]+)\2""", r"--\1 \3"),
        (rf"""\b({_FLAGS})=("[^"]*"|'[^']*')""", r"--\1 \2"),
        (r"\bmerge_adapter=(\w+)", r"--merge-adapter \1"),
        (r"(?:\w+\.)*\bload\(\.\.\., (--[^()]*)\)", r"\1"),
        (r"\bjson_schema, regex and choice\b", "--schema, --regex and --choice"),
        (r"(?<!-)\bjson_schema\b", "--schema"),
        (r"(?<!-)\bstop_token_ids\b", "--stop-token-id"),
        (r"\bengine\.(classify|rerank)\b", r"`lorax \1`"),
        ("give it as a dict, or as JSON text", "give a file, or JSON in quotes of the shell"),
    )
)


def at_command_line(error: LoraxError, command: str) -> LoraxError:
    """The error as `command`, such as "lorax generate", says it: with flags, and the help page to look at."""
    hint = None if error.hint is None else _HELP.sub(f"{command} --help lists the options", error.hint)
    return LoraxError(_with_flags(error.message), hint=None if hint is None else _with_flags(hint))


def _with_flags(text: str) -> str:
    for pattern, flag in _NAMES:
        text = pattern.sub(flag, text)
    return text
