from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_core.engine.drafting import PromptLookup


def drafted(text, limit, most, ngram):
    """The oracle: the latest earlier place where the text ended as it does now; what followed repeats from there."""
    tail = text[-ngram:]
    if len(text) < ngram:
        return []
    for place in range(len(text) - 1, ngram - 1, -1):
        if text[place - ngram : place] == tail:
            found = []
            for ahead in range(min(limit, most)):
                found.append((text + found)[place + ahead])
            return found
    return []


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=6),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_what_followed_the_last_time_is_drafted(pieces, limit, most, ngram):
    drafter, text = PromptLookup(most, ngram), []

    for piece in pieces:
        drafter.extend(piece)
        text += piece

        assert drafter.draft(limit) == drafted(text, limit, most, ngram)
        assert len(drafter) == len(text)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_a_draft_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="at least one token"):
        PromptLookup(*sizes)
