"""Completions that follow a JSON schema, a regular expression or a list of choices.

Decides how a request's constraint becomes a grammar over tokens. The work is done by llguidance, the extra
`lorax-core[structured]`, imported when first asked for; `docs/engine.md` compares it with the others.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from lorax_core.errors import RequestError
from lorax_core.serving.requests import GenerateRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class TokenGrammar:
    """One completion's state in a grammar."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def allowed(self) -> bytes:
        """Which tokens may come next, one bit each; a padded vocabulary has ids that mean nothing, which may not."""
        # [ceil(vocab / 8)] bytes: the model's rows may be more than the tokenizer's ids, and a zero bit forbids.
        return bytes(self._matcher.compute_bitmask()).ljust(-(-self._vocab // 8), b"\0")

    def advance(self, token_id: int) -> None:
        """A token was taken."""
        self._matcher.consume_token(token_id)

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> TokenGrammar:
        """The same state, to go its own way."""
        return TokenGrammar(self._matcher.deep_copy(), self._vocab)


class GrammarFactory:
    """Grammars over one tokenizer. Safe to call from any thread."""

    def __init__(self, tokenizer: Any | None, vocab: int, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_ids = sorted(eos_ids)
        self._prepared: LLTokenizer | None = None
        self._lock = threading.Lock()

    def grammar(self, request: GenerateRequest) -> TokenGrammar | None:
        """The grammar that a request asks for, None when it asks for none.

        Raises RequestError when the extra is not installed, the tokenizer cannot be used, or the constraint is not valid.
        """
        if request.json_schema is None and request.regex is None and request.choice is None:
            return None
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise RequestError(
                "json_schema, regex and choice need llguidance, which is not installed",
                hint="pip install 'lorax-core[structured]'",
            ) from error
        if request.json_schema is not None:
            schema = request.json_schema
            what = LLMatcher.grammar_from_json_schema(schema if isinstance(schema, str) else json.dumps(schema))
        elif request.regex is not None:
            what = LLMatcher.grammar_from_regex(request.regex)
        else:
            # JSON's escapes are those of strings in a Lark grammar.
            choices = " | ".join(json.dumps(choice) for choice in request.choice or [])
            what = LLMatcher.grammar_from_lark(f"start: {choices}")
        tokenizer = self._prepare()
        # Here, in the caller's thread: an invalid grammar would else fail in the step of all requests.
        problem = LLMatcher.validate_grammar(what, tokenizer)
        if problem:
            raise RequestError(f"the constraint is not valid: {problem}")
        return TokenGrammar(LLMatcher(tokenizer, what), self._vocab)

    def _prepare(self) -> LLTokenizer:
        """The tokenizer in the library's form, made once because that takes a moment."""
        # Otherwise two first requests would both convert the vocabulary.
        with self._lock:
            if self._prepared is None:
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise RequestError("structured output needs a checkpoint with a fast tokenizer (tokenizer.json)")
                if not self._eos_ids:
                    raise RequestError("structured output needs an end token, which this checkpoint does not name")
                from llguidance import LLTokenizer

                self._prepared = LLTokenizer(backend.to_str(), n_vocab=self._vocab, eos_token=self._eos_ids)
            return self._prepared
