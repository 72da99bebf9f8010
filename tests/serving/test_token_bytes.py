"""Bytes of single tokens, of every way in which vocabularies are spelled."""

from __future__ import annotations

import pytest
from builders import make_byte_tokenizer, make_letter_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from lorax_core.serving.token_bytes import TokenBytes


def make_sentencepiece():
    """As Llama 2's: blanks are "▁", and characters that have no token are bytes."""
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "cat"]
    made = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(tokens)}, merges=[], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.parametrize("text", ["the é \n漢\U0001f600", " a  b"])
def test_bytes_of_byte_level_tokens_are_the_text(text):
    tokenizer = make_byte_tokenizer()
    ids = tokenizer(text)["input_ids"]

    assert b"".join(TokenBytes(tokenizer).of(ids, special=True)) == text.encode()


def test_blanks_and_bytes_of_sentencepiece_are_read():
    tokenizer = make_sentencepiece()
    ids = tokenizer.convert_tokens_to_ids(["<s>", "▁the", "▁", "cat", "<0xC3>", "<0xA9>"])

    assert TokenBytes(tokenizer).of(ids, special=True) == [b"<s>", b" the", b" ", b"cat", b"\xc3", b"\xa9"]
    assert b"".join(TokenBytes(tokenizer).of(ids, special=False)).decode() == tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_parts_of_words_are_not_apart():
    tokenizer = make_letter_tokenizer()
    ids = tokenizer("ab c")["input_ids"]

    assert TokenBytes(tokenizer).of(ids, special=False) == [b"", b" a", b"b", b" c", b""]
    assert TokenBytes(tokenizer).of(ids[:1], special=True) == [b"[CLS]"]


def test_an_id_beyond_the_vocabulary_has_no_bytes():
    assert TokenBytes(make_byte_tokenizer()).of([100_000], special=True) == [b""]
