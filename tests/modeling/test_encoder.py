"""Post-norm encoders: how positions are counted."""

from __future__ import annotations

import pytest
import torch
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

from lorax_core.modeling.encoder import text_positions


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_positions_count_from_the_padding_id_in_each_text(padding):
    texts = [[5, 9], [padding], [padding, 7, padding, padding, 3, 5], [3] * 5, [2, padding]]
    ids = torch.tensor([token for text in texts for token in text])
    offsets = torch.tensor([at for text in texts for at in range(len(text))])
    given = ids.clone(), offsets.clone()

    found = text_positions(ids, offsets, padding).split([len(text) for text in texts])

    for text, rows in zip(texts, found, strict=True):
        expected = RobertaEmbeddings.create_position_ids_from_input_ids(torch.tensor([text]), padding)[0]
        assert rows.tolist() == expected.tolist()
    assert torch.equal(ids, given[0])
    assert torch.equal(offsets, given[1])
