"""A query and a document as a reranker was trained to read them.

Decides whether they are a pair of texts or a conversation of these roles, as sentence-transformers' CrossEncoder does, and
how one that is too long is cut. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from lorax_core.errors import RequestError, shown
from lorax_core.modeling.heads import Head, LogitScoreHead
from lorax_core.serving.text import Encoded, TextFront, cut
from lorax_core.types import Task
from lorax_core.untrusted import guarded
from lorax_core.weights.sentence import RerankerFiles

Shorten = Callable[[Encoded, int, str], Encoded]
"""What drops tokens at one side until so many are left, as `text.cut` does."""

_ROLES: Final = ("query", "document")
# A pair, then one that differs from it for each role: a template that leaves a text out makes the same of both.
_PROBES: Final = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))
# Stand for both texts: what two conversations have in common at their ends is the template's.
_FILLERS: Final = ("0", "1 2 3 4")
_OTHER: Final = "give other text"
_OTHERS: Final = 16  # readers over texts of adapters that are kept


class PairReader:
    """Reads pairs for one checkpoint, whose files of sentence-transformers are `files`. Safe to call from any thread."""

    def __init__(self, text: TextFront, files: RerankerFiles | None) -> None:
        self._text = text
        self._files = files if files is not None else RerankerFiles()
        self._stated = files is not None
        # By kind of head, at the first pair; two threads that do it at once get the same.
        self._conversations: dict[type[Head], _Conversation | None] = {}
        self._over = lru_cache(_OTHERS)(lambda text: PairReader(text, files))

    def over(self, text: TextFront) -> PairReader:
        """The reader of the same files over what an adapter brings instead of the checkpoint's tokenizer and template."""
        return self if text is self._text else self._over(text)

    def encode(self, query: str, document: str, head: Head) -> tuple[Encoded, Shorten]:
        """Ids of a pair for this head, and how they are shortened.

        Raises RequestError without a tokenizer, or when the chat template leaves out what the head must see.
        """
        if not self._text.has_tokenizer:
            raise RequestError(
                "this checkpoint has no tokenizer, so a query and a document cannot be read",
                hint="add tokenizer.json to the checkpoint",
            )
        conversation = self._conversation(head)
        if conversation is None:
            return self._text.encode((self._files.prompt + query, document), Task.SEQUENCE_CLASSIFICATION), cut
        with guarded(RequestError, f"the chat template refused {shown((query, document), 120)}", _OTHER):
            return Encoded(conversation.ids(query, document)), conversation.cut

    def _conversation(self, head: Head) -> _Conversation | None:
        """None where the head reads a pair of texts."""
        kind = type(head)
        if kind not in self._conversations:
            self._conversations[kind] = self._chosen(head)
        return self._conversations[kind]

    def _chosen(self, head: Head) -> _Conversation | None:
        tokenizer: Any = self._text.tokenizer
        if self._files.chat is False:
            return None
        problem = "it is missing" if self._files.chat else None
        if (source := self._text.template) is not None:
            try:
                found = _Conversation(source, tokenizer, self._files)
                problem = found.problem()
            except Exception as error:  # whatever jinja or the template raises
                problem = _raised(error)
            if problem is None:
                return found
        # What classifies texts was trained on pairs of them where no template says otherwise.
        if not isinstance(head, LogitScoreHead):
            return None
        # Files of sentence-transformers come with the template that the reranker was trained with, if with any.
        if head.pair_template is not None and not self._stated:
            return _Conversation(head.pair_template, tokenizer, self._files)
        if problem is None:
            return None
        raise RequestError(
            f"this reranker reads a conversation, and its chat template does not show the query and the document: {problem}",
            hint="put a chat_template.jinja beside the checkpoint that shows the messages of the roles 'query' and 'document'",
        )


class _Conversation:
    """A chat template that shows a query and a document."""

    def __init__(self, source: str, tokenizer: Any, files: RerankerFiles) -> None:
        # Late: most checkpoints have no template, and jinja is no small import.
        from lorax_core.serving.templates import ChatTemplate

        self._template = ChatTemplate(source)
        self._tokenizer = tokenizer
        self._files = files
        self._in_parts = False  # whether content is a list of parts

    def problem(self) -> str | None:
        """Why the template cannot be used; None when it shows both texts, given as they are or in parts."""
        problems: list[str] = []
        for self._in_parts in (False, True):
            try:
                pair, *others = (self._render(*one) for one in _PROBES)
            except Exception as error:  # whatever jinja or the template raises
                problems.append(_raised(error))
                continue
            left_out = [role for role, other in zip(_ROLES, others, strict=True) if other == pair]
            if not left_out:
                return None
            problems.append(f"it leaves out the {' and the '.join(left_out)}")
        return problems[0]

    def ids(self, query: str, document: str) -> list[int]:
        """The conversation as ids."""
        text = self._render(query, document)
        # The template writes the special tokens itself.
        made = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(made["input_ids"])

    def cut(self, encoded: Encoded, limit: int, side: str) -> Encoded:
        """Drop tokens at the end of the document, or of both texts, and keep what the template puts behind them."""
        if side == "start":
            raise RequestError(
                "truncate='start' would cut off what this reranker is asked to do",
                hint="truncate='end' shortens the document",
                http_hint="cut it at its end (to the right), which shortens the document",
            )
        first, second = (self.ids(filler, filler) for filler in _FILLERS)
        count = 0
        while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
            count += 1
        behind = first[len(first) - min(count, limit) :]
        return Encoded([*encoded.ids[: limit - len(behind)], *behind], truncated=True)

    def _render(self, query: str, document: str) -> str:
        texts = [("system", self._files.prompt)] if self._files.prompt else []
        texts += zip(_ROLES, (query, document), strict=True)
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for role, text in texts
        ]
        variables = {"add_generation_prompt": False, **self._files.variables}
        return self._template.render(messages, self._tokenizer.special_tokens_map, variables)


def _raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {shown(str(error))}"
