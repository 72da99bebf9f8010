"""Between strings and token ids.

Decides how prompts of every shape become ids, what is truncated from an input that is too long, and how ids become text again.
Knows nothing of models; a checkpoint without a tokenizer takes ids only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorax_core.errors import RequestError, listed, nearest, shown
from lorax_core.serving.chat import ChatWriter
from lorax_core.serving.token_bytes import TokenBytes
from lorax_core.serving.tokenizer import load_tokenizer
from lorax_core.types import Task
from lorax_core.untrusted import guarded
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.sentence import SentenceFiles

_INT = frozenset((int,))


@dataclass(frozen=True, slots=True)
class Encoded:
    """An input as ids.

    `special` marks tokens that the tokenizer added. `offsets`, character ranges in the string (in its own one, of a pair), are
    there for token classification alone, and `second` where it or no special token tells the strings apart. `pool_from` is the
    first row that pooling counts. What is not known of plain token ids is empty.
    """

    ids: list[int]
    token_types: list[int] | None = None
    special: tuple[bool, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()
    second: tuple[bool, ...] = ()  # of a pair: whether a token is of its second string
    pool_from: int = 0
    truncated: bool = False


class TextFront:
    """The tokenizer of a checkpoint, and how it is used. Safe to call from any thread.

    A `chat_template` stands in for the tokenizer's own.
    """

    def __init__(
        self, tokenizer: Any | None, sentence: SentenceFiles | None = None, chat_template: str | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._sentence = sentence
        self._chat_template = chat_template
        # Computed at the first input; two threads that do it at once get the same number.
        self._prompt_rows: dict[str, int] = {}
        self._chat = ChatWriter(tokenizer, chat_template)
        self._bytes = TokenBytes(tokenizer)
        self._special_ids: frozenset[int] | None = None

    @property
    def tokenizer(self) -> Any | None:
        """The tokenizer itself; None when the checkpoint has none."""
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    @property
    def template(self) -> str | None:
        """The chat template; None when there is none."""
        found = self._chat_template or getattr(self._tokenizer, "chat_template", None)
        # Of several by name, the one that transformers takes.
        found = found.get("default") if isinstance(found, dict) else found
        return found or None

    def like(self, tokenizer: Any, chat_template: str | None) -> TextFront:
        """Another tokenizer, used as this one is."""
        return TextFront(tokenizer, self._sentence, chat_template)

    @property
    def max_tokens(self) -> int | None:
        """The longest input that the tokenizer or the sentence files allow; None when they set no limit."""
        stated = [
            self._sentence.max_tokens if self._sentence else None,
            getattr(self._tokenizer, "model_max_length", None),
        ]
        # transformers writes a huge number where a tokenizer has no limit.
        limits = [int(limit) for limit in stated if limit is not None and limit < 10**9]
        return min(limits, default=None)

    @property
    def eos_token_id(self) -> int | None:
        found: int | None = getattr(self._tokenizer, "eos_token_id", None)
        return found

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        tokenizer = self._require("text")
        # No cleaning up of spaces: it changes text that was generated already, and stop strings and streams need prefixes
        # to stay what they were.
        with guarded(RequestError, f"the tokenizer cannot read the ids {shown(ids, 60)}", "give ids of this tokenizer"):
            text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that stand for no text; none without a tokenizer."""
        if self._special_ids is None:
            added = getattr(self._tokenizer, "added_tokens_decoder", {})
            # Those without a role are left out of texts too.
            others = (token for token, about in added.items() if about.special)
            self._special_ids = frozenset((*getattr(self._tokenizer, "all_special_ids", ()), *others))
        return self._special_ids

    def tokens(self, ids: list[int]) -> list[str]:
        """The tokenizer's own spelling of ids; empty without a tokenizer."""
        found: list[str] = self._tokenizer.convert_ids_to_tokens(ids) if self._tokenizer is not None else []
        return found

    def token_bytes(self, ids: list[int], *, special: bool) -> list[bytes]:
        """The bytes that each token stands for; special ones have their names, or nothing without `special`."""
        self._require("text")
        with guarded(RequestError, f"the tokenizer cannot read the ids {shown(ids, 60)}", "give ids of this tokenizer"):
            return self._bytes.of(ids, special=special)

    def prompt_named(self, name: str) -> str:
        """The checkpoint's prompt of this name; raises RequestError with those that there are."""
        prompts = self._sentence.prompts if self._sentence is not None else {}
        if name not in prompts:
            close = nearest(name, prompts)
            raise RequestError(
                f"prompt_name: no prompt is called {shown(name)}; the checkpoint names {listed(sorted(prompts))}",
                hint=f"did you mean {close!r}?" if close else "give the prompt itself: prompt='query: '",
                http_hint=f"did you mean {close!r}?" if close else "put the prompt before the text",
                option="prompt_name",
            )
        return prompts[name]

    def encode(
        self,
        prompt: Any,
        task: Task,
        before: str | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Ids of a prompt of any shape; raises RequestError when it needs a tokenizer or template that is not there.

        `before` goes before a text to embed, instead of what the sentence files put there; `tools` and `template_options` are
        for the template of chat messages.
        """
        if isinstance(prompt, list) and (
            _INT.issuperset(map(type, prompt)) or all(isinstance(one, int) for one in prompt)
        ):
            return Encoded(list(prompt))
        if isinstance(prompt, list):
            return Encoded(self._conversation(prompt, tools, template_options or {}))
        # Sentence files speak of embeddings alone: no prompt and no lower case for the other tasks.
        if task is not Task.EMBED:
            return self._text(prompt, offsets=task is Task.TOKEN_CLASSIFICATION)
        return self._sentence_text(prompt, before)

    def _sentence_text(self, text: str | tuple[str, str], before: str | None) -> Encoded:
        files = self._sentence
        if before is None:
            before = files.prompt if files is not None else ""
        # Joined as text, as in sentence-transformers: the tokens at the seam may differ from those of the parts.
        if isinstance(text, tuple):
            encoded = self._text((self._cased(before + text[0]), self._cased(text[1])))
        else:
            encoded = self._text(self._cased(before + text))
        if not before or files is None or files.pool_prompt:
            return encoded
        return replace(encoded, pool_from=self._rows_of(before, files))

    def _rows_of(self, prompt: str, files: SentenceFiles) -> int:
        """Rows of a prompt at the beginning of an input."""
        rows = self._prompt_rows.get(prompt)
        if rows is None:
            alone = self._text(self._cased(prompt))
            # Without the closing special token, which in the whole input comes after the text.
            rows = len(alone.ids) - int(bool(alone.special) and alone.special[-1])
            # Requests may bring any number of others.
            if prompt in files.prompts.values():
                self._prompt_rows[prompt] = rows
        return rows

    def _cased(self, text: str) -> str:
        return text.lower() if self._sentence is not None and self._sentence.lower_case else text

    def _text(self, text: str | tuple[str, str], *, offsets: bool = False) -> Encoded:
        tokenizer = self._require(f"{text!r:.40}")
        parts = text if isinstance(text, tuple) else (text,)
        # Only where they are read: making Python's numbers of them takes as long as tokenising.
        fast = bool(getattr(tokenizer, "is_fast", False))
        offsets = offsets and fast
        # A file's regular expressions may give up on a text; the library panics then.
        with guarded(RequestError, f"the tokenizer cannot read {shown(text, 60)}", "give other text, or token ids"):
            # verbose=False: the tokenizer's own warning about length would come although the limit is checked here.
            made = tokenizer(
                *parts,
                return_special_tokens_mask=True,
                return_attention_mask=False,
                return_offsets_mapping=offsets,
                verbose=False,
            )
        special = tuple(bool(mark) for mark in made["special_tokens_mask"])
        # Without a special token between them, two strings could not be told apart.
        parted = len(parts) == 2 and fast and (offsets or not any(special[1:-1]))
        return Encoded(
            ids=list(made["input_ids"]),
            token_types=made.get("token_type_ids"),
            special=special,
            offsets=tuple((int(start), int(end)) for start, end in made["offset_mapping"]) if offsets else (),
            second=tuple(text == 1 for text in made.sequence_ids()) if parted else (),
        )

    def _conversation(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: Mapping[str, Any]
    ) -> list[int]:
        tokenizer = self._require("chat messages")
        text = self._chat.text(messages, tools, options)
        with guarded(RequestError, f"the tokenizer cannot read {shown(text, 60)}", "give other messages"):
            # The template writes the special tokens itself.
            made = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(made["input_ids"])

    def _require(self, what: str) -> Any:
        if self._tokenizer is None:
            raise RequestError(
                f"this checkpoint has no tokenizer, so {what} cannot be read or written",
                hint="give token ids: list[int]",
                http_hint="give token ids, at a route that takes them",
            )
        return self._tokenizer


def cut(encoded: Encoded, limit: int, side: str) -> Encoded:
    """Drop tokens of the input, never specials, at one `side` ("start" or "end") until `limit` are left.

    Of a pair, the longer string loses tokens first. Raises RequestError when the specials alone are more than `limit`.
    """
    extra = len(encoded.ids) - limit
    if extra <= 0:
        return encoded
    special = encoded.special or (False,) * len(encoded.ids)
    texts = _texts(special, encoded.second or (False,) * len(special))
    if sum(len(text) for text in texts) < extra:
        raise RequestError(
            f"{limit} tokens do not hold the special tokens of {len(special)}",
            hint="leave truncate out; no text of this kind fits the model",
        )
    # Indices into `encoded.ids`, so they stay valid while tokens are dropped.
    dropped: set[int] = set()
    for text, length in zip(texts, _shortened([len(text) for text in texts], extra), strict=True):
        dropped.update(text[: len(text) - length] if side == "start" else text[length:])
    kept = [at for at in range(len(encoded.ids)) if at not in dropped]
    types = encoded.token_types
    return Encoded(
        ids=[encoded.ids[at] for at in kept],
        token_types=[types[at] for at in kept] if types is not None else None,
        special=tuple(special[at] for at in kept),
        offsets=tuple(encoded.offsets[at] for at in kept if encoded.offsets),
        second=tuple(encoded.second[at] for at in kept if encoded.second),
        pool_from=sum(1 for at in kept if at < encoded.pool_from),
        truncated=True,
    )


def _shortened(lengths: list[int], extra: int) -> list[int]:
    """Lengths from which `extra` tokens were taken one by one, each from the longest (the first of several)."""
    left = list(lengths)
    # The longest come down to the next shorter one together, so this takes a turn for each string and none for each token.
    while extra:
        most = max(left)
        longest = [at for at, length in enumerate(left) if length == most]
        below = max((length for length in left if length < most), default=0)
        down = min(most - below, extra // len(longest))
        if down:
            for at in longest:
                left[at] -= down
            extra -= down * len(longest)
        else:
            for at in longest[:extra]:
                left[at] -= 1
            extra = 0
    return left


def _texts(special: tuple[bool, ...], second: tuple[bool, ...]) -> list[list[int]]:
    """Indices of the tokens of each string: runs between special tokens, or up to where the second string begins."""
    texts: list[list[int]] = []
    before: tuple[bool, bool] | None = None
    for at, now in enumerate(zip(special, second, strict=True)):
        if not now[0]:
            if now != before:
                texts.append([])
            texts[-1].append(at)
        before = now
    return texts


def load_text_front(checkpoint: Checkpoint, sentence: SentenceFiles | None) -> TextFront:
    """The tokenizer beside a checkpoint, when there is one; raises CheckpointError when its files are broken."""
    return TextFront(load_tokenizer(checkpoint.path, checkpoint.config), sentence)
