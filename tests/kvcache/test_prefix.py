from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorax_core.kvcache.prefix import PrefixIndex, chain

TEXTS = st.lists(st.integers(0, 2), max_size=9)


def keys(tokens, salt="", size=2):
    """Keys of the full pages of a text."""
    made = []
    for start in range(0, len(tokens) - size + 1, size):
        made.append(chain(made[-1] if made else None, salt, tokens[start : start + size]))
    return made


@given(TEXTS, TEXTS)
def test_pages_have_one_key_exactly_as_far_as_texts_are_alike(one, other):
    alike = [at for at in range(0, min(len(one), len(other)) - 1, 2) if one[: at + 2] == other[: at + 2]]

    same = [a == b for a, b in zip(keys(one), keys(other), strict=False)]

    assert same == [True] * len(alike) + [False] * (len(same) - len(alike))


@given(TEXTS)
def test_a_salt_keeps_equal_texts_apart(tokens):
    plain, salted = keys(tokens), keys(tokens, "adapter")

    assert not set(plain) & set(salted)


def test_a_key_keeps_the_first_page_that_it_was_given():
    index = PrefixIndex()

    assert index.publish(b"a", 3)
    assert index.publish(b"a", 3)
    assert not index.publish(b"a", 4)
    assert not index.publish(b"b", 3)

    assert index.find(b"a") == 3
    assert index.find(b"b") is None
    assert 4 not in index
    index.check()


def test_a_page_that_is_forgotten_can_be_given_another_key():
    index = PrefixIndex()
    index.publish(b"a", 3)

    index.forget(3)
    index.forget(3)

    assert index.find(b"a") is None
    assert index.publish(b"b", 3)
    assert len(index) == 1
