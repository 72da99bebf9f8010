from __future__ import annotations

import json
from dataclasses import replace

import pytest
from builders import CHAT_TEMPLATE, EOS, make_byte_tokenizer, make_letter_tokenizer, make_qwen2
from hypothesis import given, settings
from hypothesis import strategies as st
from rigs import within
from tokenizers import processors

from lorax_core.errors import CheckpointError, RequestError, shown
from lorax_core.serving.text import Encoded, TextFront, _shortened, cut, load_text_front
from lorax_core.types import Pooling, Task
from lorax_core.weights.checkpoint import Checkpoint
from lorax_core.weights.sentence import SentenceFiles

CLS, SEP = 2, 3
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
LETTERS = make_letter_tokenizer()


def ids_of(text):
    return LETTERS(text, add_special_tokens=False)["input_ids"]


def make_sentence(**changes):
    return SentenceFiles(**{"pooling": Pooling.MEAN, "normalize": False, **changes})


@pytest.mark.parametrize("task", list(Task))
def test_token_ids_are_taken_as_they_are(task):
    encoded = TextFront(LETTERS, make_sentence(prompt="find: ")).encode([5, 5, 900], task)

    assert encoded == Encoded([5, 5, 900])


def test_a_text_is_what_the_tokenizer_makes_of_it():
    encoded = TextFront(LETTERS).encode("ab c", Task.TOKEN_CLASSIFICATION)

    assert encoded.ids == LETTERS("ab c")["input_ids"] == [CLS, *ids_of("ab c"), SEP]
    assert encoded.special == (True, False, False, False, True)
    assert encoded.offsets[1:-1] == ((0, 1), (1, 2), (3, 4))


@pytest.mark.parametrize("task", [Task.EMBED, Task.SEQUENCE_CLASSIFICATION, Task.GENERATE])
def test_offsets_are_left_out_where_nobody_reads_them(task):
    found, whole = (TextFront(LETTERS).encode(("ab", "c"), one) for one in (task, Task.TOKEN_CLASSIFICATION))

    assert found == replace(whole, offsets=(), second=())


@pytest.mark.parametrize("first", ["", EOS + " "], ids=["nothing", "one in front"])
def test_a_pair_with_nothing_between_its_texts_loses_tokens_of_the_longer_one(first):
    tokenizer = make_byte_tokenizer()
    around = processors.TemplateProcessing(
        single=f"{first}$A", pair=f"{first}$A $B", special_tokens=[(EOS, 256)] if first else []
    )
    tokenizer.backend_tokenizer.post_processor = around
    expected = tokenizer("x" * 20, "yz", truncation="longest_first", max_length=9)["input_ids"]

    encoded = TextFront(tokenizer).encode(("x" * 20, "yz"), Task.SEQUENCE_CLASSIFICATION)

    assert cut(encoded, 9, "end").ids == expected
    assert expected[-2:] == list(b"yz")


def test_a_pair_has_the_token_types_of_the_tokenizer():
    encoded = TextFront(LETTERS).encode(("ab", "c"), Task.TOKEN_CLASSIFICATION)

    oracle = LETTERS("ab", "c")
    assert encoded.ids == oracle["input_ids"]
    assert encoded.token_types == oracle["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert encoded.second == (False, False, False, False, True, False)


def test_chat_messages_go_through_the_template():
    tokenizer = make_byte_tokenizer()

    encoded = TextFront(tokenizer).encode(CHAT, Task.GENERATE)

    assert tokenizer.decode(encoded.ids) == "user: hi\nassistant: yes?\nassistant: "


@pytest.mark.parametrize(
    "messages",
    [[{"role": "nobody", "content": "x"}], [{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": 3}]],
)
def test_messages_that_the_template_refuses_are_quoted(messages):
    with pytest.raises(RequestError) as caught:
        TextFront(make_byte_tokenizer(CHAT_TEMPLATE)).encode(messages, Task.GENERATE)

    assert "the chat template refused" in caught.value.message
    assert shown(messages, 120) in caught.value.message


def test_messages_without_a_template_are_refused_with_the_way_out():
    with pytest.raises(RequestError, match="no chat template") as caught:
        TextFront(make_byte_tokenizer(chat_template=None)).encode(CHAT, Task.GENERATE)

    assert "one string" in caught.value.hint


@pytest.mark.parametrize("prompt", ["a long text that is quoted", ("a", "b"), CHAT])
def test_without_a_tokenizer_only_ids_are_served(prompt):
    front = TextFront(None)

    assert front.encode([1, 2], Task.GENERATE).ids == [1, 2]
    assert not front.has_tokenizer
    with pytest.raises(RequestError, match="no tokenizer") as caught:
        front.encode(prompt, Task.EMBED)
    assert "list[int]" in caught.value.hint


def test_special_tokens_are_no_part_of_a_text():
    tokenizer = make_byte_tokenizer()

    assert TextFront(tokenizer).decode([*tokenizer("hé")["input_ids"], 256]) == "hé"


@pytest.mark.parametrize(
    ("files", "tokenizer", "limit"), [(None, 96, 96), (20, 96, 20), (200, 96, 96), (None, 10**30, None)]
)
def test_the_longest_text_is_the_smallest_limit_that_anybody_states(files, tokenizer, limit):
    front = TextFront(make_letter_tokenizer(tokenizer), make_sentence(max_tokens=files) if files else None)

    assert front.max_tokens == limit


def test_a_prompt_is_put_before_a_text_that_is_embedded_and_only_then():
    front = TextFront(LETTERS, make_sentence(prompt="Q: ", lower_case=True))

    assert front.encode("Ab", Task.EMBED).ids == [CLS, *ids_of("q: ab"), SEP]
    assert front.encode("Ab", Task.TOKEN_CLASSIFICATION).ids == [CLS, *ids_of("Ab"), SEP]


def test_rows_of_a_prompt_are_counted_when_pooling_leaves_them_out():
    front = TextFront(LETTERS, make_sentence(prompt="Q: ", pool_prompt=False))

    assert front.encode("Ab", Task.EMBED).pool_from == 1 + len(ids_of("Q:"))
    assert front.encode("", Task.EMBED).pool_from == 1 + len(ids_of("Q:"))


@st.composite
def encodings(draw):
    """One text or a pair between special tokens, as BERT's tokenizer makes them, with everything that runs parallel."""
    first = draw(st.integers(0, 8))
    second = draw(st.none() | st.integers(0, 8))
    texts = [first] if second is None else [first, second]
    special, types, offsets, of_second = [True], [0], [(0, 0)], [False]
    for at, length in enumerate(texts):
        special += [False] * length + [True]
        types += [at] * (length + 1)
        offsets += [(place, place + 1) for place in range(length)] + [(0, 0)]
        of_second += [at == 1] * length + [False]
    ids = list(range(100, 100 + len(special)))
    prompt = draw(st.integers(0, first + 1)) if second is None else 0
    return texts, Encoded(ids, types, tuple(special), tuple(offsets), tuple(of_second), prompt)


@given(encodings(), st.integers(0, 24), st.sampled_from(["start", "end"]))
def test_a_cut_keeps_specials_and_the_right_end_of_every_text(made, limit, side):
    texts, encoded = made
    specials = sum(encoded.special)
    if limit < specials and len(encoded.ids) > limit:
        with pytest.raises(RequestError, match=f"{limit} tokens do not hold"):
            cut(encoded, limit, side)
        return

    short = cut(encoded, limit, side)

    assert len(short.ids) == min(limit, len(encoded.ids))
    assert short.truncated is (len(encoded.ids) > limit)
    places = [token - 100 for token in short.ids]
    assert places == sorted(places)
    assert {at for at, mark in enumerate(encoded.special) if mark} <= set(places)
    assert short.special == tuple(encoded.special[at] for at in places)
    assert short.token_types == [encoded.token_types[at] for at in places]
    assert short.offsets == tuple(encoded.offsets[at] for at in places)
    assert short.second == tuple(encoded.second[at] for at in places)
    assert short.pool_from == sum(at < encoded.pool_from for at in places)
    # Of each text one run is left, at the side that was not cut; of a pair the longer text lost first.
    kept = [
        sum(1 for at in places if not encoded.special[at] and encoded.token_types[at] == which)
        for which in range(len(texts))
    ]
    for which, (count, length) in enumerate(zip(kept, texts, strict=True)):
        begin = 1 if which == 0 else 2 + texts[0]
        run = [at for at in places if begin <= at < begin + length]
        assert run == (
            list(range(begin, begin + count)) if side == "end" else list(range(begin + length - count, begin + length))
        )
    if len(texts) == 2 and short.truncated:
        assert abs(kept[0] - kept[1]) <= 1 or min(kept) == min(texts)


def test_ids_without_specials_are_cut_at_either_end():
    encoded = Encoded([1, 2, 3, 4, 5])

    assert cut(encoded, 3, "start").ids == [3, 4, 5]
    assert cut(encoded, 3, "end").ids == [1, 2, 3]
    assert cut(encoded, 5, "end") is encoded


def test_a_checkpoint_without_tokenizer_files_has_no_tokenizer(tmp_path):
    assert not load_text_front(Checkpoint(make_qwen2(tmp_path, tokenizer=False)), None).has_tokenizer


@pytest.mark.parametrize("content", ["{", "{}", "[]", json.dumps({"model": {"type": "Unknown"}})])
def test_a_broken_tokenizer_is_a_checkpoint_error_that_names_the_folder(tmp_path, content):
    folder = make_qwen2(tmp_path)
    (folder / "tokenizer.json").write_text(content)

    with pytest.raises(CheckpointError) as caught:
        load_text_front(Checkpoint(folder), None)

    assert str(folder) in caught.value.message


@settings(max_examples=200)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.data())
def test_the_longest_string_loses_its_tokens_first_one_by_one(lengths, data):
    extra = data.draw(st.integers(0, sum(lengths)))
    one_by_one = list(lengths)
    for _ in range(extra):
        one_by_one[one_by_one.index(max(one_by_one))] -= 1

    assert _shortened(lengths, extra) == one_by_one


@pytest.mark.parametrize("side", ["start", "end"])
def test_a_very_long_input_is_cut_without_a_turn_for_each_token(side):
    # Taken one by one from the front of a list, these would take hours.
    ids = list(range(3_000_000))

    kept = within(60, lambda: cut(Encoded(ids), 10, side)).ids

    assert kept == (ids[-10:] if side == "start" else ids[:10])
