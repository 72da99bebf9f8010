from __future__ import annotations

import pytest
from builders import make_byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lorax_core.engine.detokenizer import Detokenizer

TOKENIZER = make_byte_tokenizer()
VOCAB = len(TOKENIZER)


class Bytes:
    """Ids to text as an engine has it: special tokens left out."""

    def decode(self, ids):
        return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Words:
    """A decoder that looks at its neighbours: a space goes before every word but the first."""

    vocab = ("▁the", "▁list", "▁of", "s", "▁", "é")

    def __init__(self):
        self.tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(self.vocab)}, unk_token="s"))
        self.tokenizer.decoder = decoders.Metaspace()

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def pieces(decoder, ids):
    detokenizer = Detokenizer(decoder)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def text_ids(text):
    return TOKENIZER(text)["input_ids"]


@given(st.text("ab é€日👍\u200d\u0301\ufffd\U0001f1e9", max_size=30))
@example("naïve café — 日本語 👩‍👩‍👧‍👦 🇩🇪")
@example("a\ufffdb")
def test_pieces_of_a_text_are_the_text_and_split_no_character(text):
    shown = pieces(Bytes(), text_ids(text))

    assert "".join(shown) == text
    # A character of the text itself may be U+FFFD; a piece must not make one up.
    assert sum(piece.count("\ufffd") for piece in shown) == text.count("\ufffd")


@given(st.lists(st.integers(0, VOCAB - 1), max_size=40))
@example([0xE2, 0x82, 0x41, 0xAC])
@example([0xF0, 0x9F, 256, 0x98, 0x80])
@example([256] * 10)
def test_pieces_of_any_tokens_are_the_whole_decoded(ids):
    assert "".join(pieces(Bytes(), ids)) == Bytes().decode(ids)


@given(st.lists(st.integers(0, len(Words.vocab) - 1), max_size=20))
def test_pieces_of_a_decoder_that_looks_at_neighbours_are_the_whole_decoded(ids):
    words = Words()

    assert "".join(pieces(words, ids)) == words.decode(ids)


def test_a_character_of_several_tokens_comes_out_with_the_last_of_them():
    ids = list("€".encode())

    assert pieces(Bytes(), [*ids, 0x21]) == ["", "", "€", "!", ""]


def test_an_incomplete_character_shows_at_the_end_only():
    ids = list("€".encode())[:2]

    assert pieces(Bytes(), [0x41, *ids]) == ["A", "", "", "\ufffd"]


@pytest.mark.parametrize("count", [3, 30])
def test_special_tokens_show_nothing(count):
    assert pieces(Bytes(), [0x41, *[256] * count, 0x42]) == ["A", *[""] * count, "B", ""]


def test_only_the_newest_tokens_are_decoded_again():
    class Counting(Bytes):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    decoder = Counting()

    pieces(decoder, text_ids("a long text of many plain words " * 20))

    assert decoder.longest <= 4
