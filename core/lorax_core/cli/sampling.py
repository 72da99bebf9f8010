"""What all commands that generate have in common: the flags of sampling, of where an answer ends, and of its form.

Decides how they are written on a command line. Knows nothing of their ranges: `GenerateRequest` checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lorax_core.cli.batches import as_text
from lorax_core.cli.flags import with_flags
from lorax_core.errors import RequestError, shown
from lorax_core.untrusted import read_json

_SAMPLING: Final = "Sampling"
_END: Final = "Length and end"
_FORM: Final = "Form of the answer"


def _flag(panel: str, kind: Any, help: str, *names: str, metavar: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(*names, metavar=metavar, help=help, rich_help_panel=panel)]


# By the names of `GenerateRequest`, but for stop_token_id and schema. What was left out is left to its defaults.
FLAGS: Final[Mapping[str, Any]] = {
    "temperature": _flag(
        _SAMPLING, float, "0, the default, takes the most likely token each time; above 0, tokens are sampled."
    ),
    "top_k": _flag(_SAMPLING, int, "Sample from the N most likely tokens.", metavar="N"),
    "top_p": _flag(_SAMPLING, float, "Sample from the most likely tokens that have this probability together."),
    "min_p": _flag(
        _SAMPLING, float, "Sample from tokens with this share of the most likely one's probability, or more."
    ),
    "typical_p": _flag(_SAMPLING, float, "Sample from the most typical tokens that have this probability together."),
    "repetition_penalty": _flag(_SAMPLING, float, "Above 1, tokens of prompt and answer become less likely."),
    "presence_penalty": _flag(_SAMPLING, float, "Lower the logits of tokens that the answer has already, once each."),
    "frequency_penalty": _flag(
        _SAMPLING, float, "Lower the logits of tokens that the answer has already, for each time."
    ),
    "logit_bias": _flag(_SAMPLING, list[str], "Add to the logit of a token. Repeatable.", metavar="ID=VALUE"),
    "seed": _flag(_SAMPLING, int, "Random seed: the same seed gives the same answer."),
    "max_tokens": _flag(_END, int, "Maximum number of tokens of the answer."),
    "min_tokens": _flag(_END, int, "Minimum number of tokens of the answer."),
    "stop": _flag(_END, list[str], "End the answer before this text. Repeatable.", metavar="TEXT"),
    "stop_token_id": _flag(_END, list[int], "End the answer before this token. Repeatable.", metavar="ID"),
    "ignore_eos": _flag(_END, bool, "Go on after the model's end tokens.", "--ignore-eos"),
    "schema": _flag(_FORM, str, "The answer is JSON that fits this JSON Schema.", metavar="FILE|JSON"),
    "regex": _flag(_FORM, str, "The answer matches this regular expression.", metavar="PATTERN"),
    "choice": _flag(_FORM, list[str], "The answer is this text, or another --choice. Repeatable.", metavar="TEXT"),
}


def samples(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the flags of sampling. Its keyword `sampling` has what they say, as options of `GenerateRequest`."""
    return with_flags(command, "sampling", FLAGS, lambda _, given: request_options(given))


def request_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `GenerateRequest` from flags; those left out are left out. Raises BadParameter or RequestError."""
    # Not by truth: a temperature or a seed of 0 is said.
    said = {name: value for name, value in given.items() if value is not None and value != []}
    if "logit_bias" in said:
        said["logit_bias"] = _biases(said["logit_bias"])
    if "stop_token_id" in said:
        said["stop_token_ids"] = list(said.pop("stop_token_id"))
    if "schema" in said:
        said["json_schema"] = _schema(said.pop("schema"))
    if "regex" in said:
        said["regex"] = as_text(said["regex"], "--regex")
    for name in ("stop", "choice"):
        if name in said:
            said[name] = [as_text(text, f"--{name}") for text in said[name]]
    return said


def _biases(given: Iterable[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for one in given:
        token, equals, value = one.partition("=")
        try:
            if not (equals and token.isascii() and token.isdecimal()):
                raise ValueError
            # Python converts no number of thousands of digits.
            number, bias = int(token), float(value)
        except ValueError as error:
            raise typer.BadParameter(f"{shown(one)} is not ID=VALUE", param_hint="--logit-bias") from error
        # A later one would silently win in a dict.
        if number in biases:
            raise typer.BadParameter(f"token {number} has two biases", param_hint="--logit-bias")
        biases[number] = bias
    return biases


def _schema(given: str) -> Any:
    """The JSON itself, which is checked with the request, or what is in a file."""
    if given.lstrip().startswith("{"):
        return as_text(given, "--schema")
    try:
        return read_json(Path(given), RequestError)
    except RequestError as error:
        raise RequestError(
            f"--schema: {error.message}", hint="give a file, or JSON that begins with {, in quotes of the shell"
        ) from error
