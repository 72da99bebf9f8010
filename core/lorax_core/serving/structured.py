"""Completions that follow a JSON schema, a regular expression or a list of choices.

Decides how a request's constraint becomes a grammar over tokens, how large one may be, and that a grammar which the library
gives up on ends its request with an error. A grammar is built in the caller's thread, which may take a few seconds at most.
The work is done by llguidance, the extra `lorax-core[structured]`, imported when first asked for; `docs/engine.md` compares
it with the others.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lorax_core.errors import CapacityError, RequestError
from lorax_core.serving.requests import GenerateRequest
from lorax_core.serving.tools import SPACED, constrain, grammar_of
from lorax_core.untrusted import guarded, unusable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SCHEMA_LENGTH: Final = 256 * 1024
"""Characters of the longest JSON schema."""
SCHEMA_PARTS: Final = 5_000
"""Keys and elements of the largest one; the time that building takes grows with the square of its properties."""
JOINED_PARTS: Final = 8
"""Parts that `allOf` may join where strings have patterns: the time that joining takes grows fourfold with each."""
# Above the library's own, which a few hundred optional properties reach; a step of the largest grammar takes about 10 ms.
_ROW_ITEMS: Final = 50_000
_STEP_ITEMS: Final = 200_000
_CORRECT: Final = "json_schema follows JSON Schema, draft 2020-12; regex has no look-around and no back-references"
_SIMPLER: Final = "make the constraint simpler: fewer properties, alternatives or repetitions"


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer in the library's form, the rows of the model, and which ids are special to the library, one bit each.

    `own` are those of them that are text to everybody else: "<tool_call>" of a tokenizer that has it, say.
    """

    library: LLTokenizer
    vocab: int
    special: int
    own: Mapping[str, int]


class TokenGrammar:
    """One completion's state in a grammar; raises RequestError or CapacityError where the library gives up on it."""

    def __init__(self, matcher: LLMatcher, tokens: _Tokens, mask: bytes | None = None) -> None:
        self._matcher = matcher
        self._tokens = tokens
        # Computed ahead, so that the library gives up where one sequence is concerned, and not where a step of many is made.
        self._mask = self._compute() if mask is None else mask

    def allowed(self) -> bytes:
        """Which tokens may come next, one bit each; a padded vocabulary has ids that mean nothing, which may not."""
        return self._mask

    def advance(self, token_id: int) -> None:
        """A token was taken."""
        with guarded(CapacityError, "the constraint cannot be followed", hint=_SIMPLER):
            self._matcher.consume_token(token_id)
        self._check()
        if not self.complete:
            self._mask = self._compute()

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> TokenGrammar:
        """The same state, to go its own way."""
        return TokenGrammar(self._matcher.deep_copy(), self._tokens, self._mask)

    def _compute(self) -> bytes:
        with guarded(CapacityError, "the constraint cannot be followed", hint=_SIMPLER):
            mask = bytes(self._matcher.compute_bitmask())
            if not self._matcher.is_accepting():
                mask = self._spelt_out(mask)
        self._check()
        # [ceil(vocab / 8)] bytes: the model's rows may be more than the tokenizer's ids, and a zero bit forbids.
        return mask.ljust(-(-self._tokens.vocab // 8), b"\0")

    def _spelt_out(self, mask: bytes) -> bytes:
        """Without special tokens: of text that must come, the library asks for the special token which is written like it."""
        bits = int.from_bytes(mask, "little")
        plain = bits & ~self._tokens.special
        if plain == bits:
            return mask
        if not plain:
            text = self._matcher.compute_ff_bytes().decode(errors="ignore")
            spelt = self._tokens.library.greedy_tokenize(text)
            if not spelt:
                self._check()
                raise CapacityError("the constraint cannot be followed: no token may come next", hint=_SIMPLER)
            plain = 1 << spelt[0]
        return plain.to_bytes(len(mask), "little")

    def _check(self) -> None:
        """A matcher in error says that it has stopped, as it does at the end of a text; only this tells the two apart."""
        if self._matcher.is_error():
            said = " ".join(self._matcher.get_error().partition("<")[0].split())
            raise CapacityError(f"the constraint cannot be followed any further: {said:.300}", hint=_SIMPLER)


class GrammarFactory:
    """Grammars over the tokenizers of one model, whose rows are `vocab`. Safe to call from any thread."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._prepared: weakref.WeakKeyDictionary[Any, _Tokens] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def grammar(self, request: GenerateRequest, tokenizer: Any | None, eos_ids: frozenset[int]) -> TokenGrammar | None:
        """The grammar that a request asks for, None when it asks for none.

        `tokenizer` is the one that writes the request's text, and `eos_ids` are what ends it.

        Raises RequestError when the extra is not installed, the tokenizer cannot be used, or the constraint is not valid.
        """
        constrained = request.json_schema is not None or request.regex is not None or request.choice is not None
        calling = bool(request.tools) and (constrained or constrain(request.tools or [], request.tool_choice))
        if not constrained and not calling:
            return None
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RequestError(
                "json_schema, regex, choice and calls of tools that must come need llguidance, which is not installed",
                hint="pip install 'lorax-core[structured]'",
            ) from error
        tokens = self._prepare(tokenizer, eos_ids)
        what = _calls(request, tokens.own) if calling else _grammar(request, LLMatcher)
        if calling:
            # The marks of calls are meant, where other texts that are written like a token are not.
            tokens = replace(tokens, special=tokens.special & ~sum(1 << at for at in tokens.own.values()))
        # Here, in the caller's thread: an invalid grammar would else fail in the step of all requests.
        with guarded(RequestError, "the constraint is not valid", hint=_CORRECT):
            limits = LLParserLimits(max_items_in_row=_ROW_ITEMS, step_max_items=_STEP_ITEMS, verbose_errors=False)
            matcher = LLMatcher(tokens.library, what, log_level=0, limits=limits)
            problem = matcher.get_error()
        if problem:
            said = " ".join(problem.partition("<")[0].split())
            raise RequestError(f"the constraint is not valid: {said:.300}", hint=_CORRECT)
        try:
            return TokenGrammar(matcher, tokens)
        except CapacityError as error:  # no first token: a schema that refers to itself, say
            raise RequestError(f"the constraint allows no text: {error.message}", hint=_SIMPLER) from error

    def _prepare(self, tokenizer: Any | None, eos_ids: frozenset[int]) -> _Tokens:
        """A tokenizer in the library's form, made once because that takes a moment."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError(
                "structured output needs a checkpoint with a fast tokenizer (tokenizer.json)",
                hint="make one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
            )
        if not eos_ids:
            raise RequestError(
                "structured output needs an end token, which this checkpoint does not name",
                hint="set eos_token_id in generation_config.json",
            )
        # Otherwise two first requests would both convert the vocabulary.
        with self._lock:
            found = self._prepared.get(tokenizer)
            if found is None:
                found = self._prepared[tokenizer] = self._converted(tokenizer, backend, eos_ids)
        return found

    def _converted(self, tokenizer: Any, backend: Any, eos_ids: frozenset[int]) -> _Tokens:
        from llguidance import LLTokenizer

        with guarded(
            RequestError,
            "structured output cannot use this checkpoint's tokenizer",
            "leave json_schema, regex and choice out",
        ):
            made = LLTokenizer(backend.to_str(), n_vocab=self._vocab, eos_token=sorted(eos_ids))
            special = sum(1 << at for at in range(made.vocab_size) if made.is_special_token(at))
            added = getattr(tokenizer, "added_tokens_decoder", {})
            own = {one.content: at for at, one in added.items() if not one.special and special >> at & 1}
            return _Tokens(made, self._vocab, special, own)


def _calls(request: GenerateRequest, own: Mapping[str, int]) -> str:
    """The grammar of a request whose tools constrain it."""
    tools = request.tools or []
    answer = None if request.json_schema is None else _checked_schema(request.json_schema)
    schemas = [tool["function"].get("parameters") for tool in tools]
    # All are built at once, so they are bounded together.
    _checked_schema({"tools": schemas, "answer": json.loads(answer or "null")}, "the schema of all tools")
    return grammar_of(tools, request.tool_choice, answer, parallel=request.parallel_tool_calls, own=own)


def _grammar(request: GenerateRequest, matcher: type[LLMatcher]) -> str:
    """A request's constraint in the library's language."""
    if request.json_schema is not None:
        schema = _checked_schema(request.json_schema)
        with guarded(RequestError, "the constraint is not valid", hint=_CORRECT):
            return str(matcher.grammar_from_json_schema(schema))
    if request.regex is not None:
        return str(matcher.grammar_from_regex(request.regex))
    # One terminal, for which the lexer builds one automaton: as rules, each choice would be an item of every row.
    # JSON's escapes are those of strings in a Lark grammar.
    choices = " | ".join(json.dumps(choice) for choice in request.choice or [])
    return str(matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}"))


def _checked_schema(given: dict[str, Any] | str, what: str = "json_schema") -> str:
    """The text of a schema that is JSON, of bounded size; raises RequestError, which calls it `what`."""
    with guarded(RequestError, "the constraint is not a JSON schema", hint="give it as a dict, or as JSON text"):
        if isinstance(given, str) and len(given) > SCHEMA_LENGTH:
            raise RequestError(
                f"{what} has {len(given):,} characters; at most {SCHEMA_LENGTH:,} are read", hint=_SIMPLER
            )
        found = json.loads(given) if isinstance(given, str) else given
        problem = unusable(found)
        if problem is not None:
            raise RequestError(f"{what} {problem}", hint="give a schema of plain JSON")
        parts, wide = _parts(found)
        text = json.dumps(found, allow_nan=False)
    if not isinstance(found, dict):
        raise RequestError(f"{what} is {found!r:.60}, not an object", hint='a schema is {"type": ...}')
    if len(text) > SCHEMA_LENGTH or parts > SCHEMA_PARTS:
        raise RequestError(
            f"{what} has {len(text):,} characters, and {parts:,} keys and elements; at most {SCHEMA_LENGTH:,} and "
            f"{SCHEMA_PARTS:,} are read",
            hint=_SIMPLER,
        )
    joined = _joined(found)
    if joined > JOINED_PARTS and _has_text_rules(found):
        raise RequestError(
            f"{what} joins {joined:,} parts by allOf, and has patterns or formats; beside them at most {JOINED_PARTS}",
            hint="write one pattern for what several say together",
        )
    if wide is not None:
        raise RequestError(
            f"{what} has the number {wide:.6g}, which does not fit in 64 bits", hint=f"numbers reach {2**63 - 1}"
        )
    return json.dumps({**found, **SPACED})


def _dicts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema."""
    left = [schema]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield item
        if isinstance(item, (dict, list)):
            left += item.values() if isinstance(item, dict) else item


def _joined(schema: Any) -> int:
    """How many parts all `allOf` of a schema have together: they may lie in each other, or refer to each other."""
    return sum(len(one["allOf"]) for one in _dicts(schema) if isinstance(one.get("allOf"), list))


def _has_text_rules(schema: Any) -> bool:
    return any(isinstance(one.get(name), str) for one in _dicts(schema) for name in ("pattern", "format"))


def _parts(schema: Any) -> tuple[int, float | None]:
    """How many keys and elements a schema has, and a whole number in it that is too large for the library."""
    count, wide, left = 0, None, [schema]
    while left:
        item = left.pop()
        count += 1
        if isinstance(item, (dict, list)):
            left += item.values() if isinstance(item, dict) else item
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            # As a float, for the error: Python does not print numbers of more than 4,300 digits.
            wide = float("inf") if abs(item) > 10**300 else float(item)
    return count, wide
