"""Which requests a cached beginning serves, and which compute every row again; answers are the same either way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import make_lora, make_qwen2, make_qwen2_model
from rigs import make_adapters, make_loaded, make_loop, make_sequence
from torch import nn

from lorax_core.engine.sequence import Sequence
from lorax_core.modeling.heads import EmbeddingHead
from lorax_core.types import Pooling, Task

PROMPT = list(range(40))  # two full pages of 16 and a half


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


def make_embedding(base, pooling):
    head = base.model.head(Task.EMBED)
    assert isinstance(head, EmbeddingHead)
    head.pooling = pooling
    heard = []
    return Sequence(task=Task.EMBED, prompt=PROMPT, span=head.span(PROMPT, 0), sink=heard.append), heard


def finished(loop, sequence):
    loop.add(sequence)
    while loop.busy:
        loop.step()
        loop.scheduler.check()
    return sequence


def warm(base, adapters=None):
    """A loop whose cache knows the prompt."""
    loop = make_loop(base, adapters=adapters)
    finished(loop, make_sequence(PROMPT, 1))
    return loop


def test_generation_begins_with_what_is_cached(base):
    cold = finished(make_loop(base), make_sequence(PROMPT, 8))

    found = finished(warm(base), make_sequence(PROMPT, 8))

    assert (cold.reused, found.reused) == (0, 32)
    assert found.output == cold.output


@pytest.mark.parametrize(("pooling", "reused"), [(Pooling.LAST, 32), (Pooling.MEAN, 0), (Pooling.CLS, 0)])
def test_pooling_reuses_rows_that_it_does_not_read(base, pooling, reused):
    one, cold = make_embedding(base, pooling)
    other, found = make_embedding(base, pooling)

    finished(make_loop(base), one)
    finished(warm(base), other)

    assert (one.reused, other.reused) == (0, reused)
    assert np.allclose(found[-1].answer, cold[-1].answer, atol=1e-5)


def test_prompt_scores_need_every_row(base):
    sequence = make_sequence(PROMPT, 2)
    sequence.prompt_logprobs = 1

    finished(warm(base), sequence)

    assert sequence.reused == 0
    assert len(sequence.prompt_scores) == len(PROMPT) - 1


def test_a_chunked_mean_is_the_mean_of_the_whole(base):
    sequence, heard = make_embedding(base, Pooling.MEAN)
    whole, expected = make_embedding(base, Pooling.MEAN)

    finished(make_loop(base, max_tokens=7), sequence)
    finished(make_loop(base, max_tokens=64), whole)

    assert np.allclose(heard[-1].answer, expected[-1].answer, atol=1e-5)


def test_labels_of_the_last_token_reuse_and_labels_of_tokens_do_not(tmp_path, host):
    from transformers import Qwen2ForSequenceClassification, Qwen2ForTokenClassification

    reused = {}
    for kind in (Qwen2ForSequenceClassification, Qwen2ForTokenClassification):
        made = kind(make_qwen2_model().config)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
        made.save_pretrained(tmp_path / kind.__name__)
        base = make_loaded(tmp_path / kind.__name__, host)
        loop, task = make_loop(base), base.default_task
        for _ in range(2):
            span = base.model.head(task).span(PROMPT, 0)
            last = finished(loop, Sequence(task=task, prompt=PROMPT, span=span))
        reused[task] = last.reused

    assert reused == {Task.SEQUENCE_CLASSIFICATION: 32, Task.TOKEN_CLASSIFICATION: 0}


def test_what_an_adapter_computed_serves_that_adapter_alone(base, tmp_path):
    folder = make_lora(make_qwen2_model(), tmp_path, target_modules="all-linear")
    store = make_adapters(base, one=folder)
    adapter = store.get("one")
    loop = warm(base, store)

    first = finished(loop, make_sequence(PROMPT, 1, adapter=adapter))
    second = finished(loop, make_sequence(PROMPT, 1, adapter=adapter))
    plain = finished(loop, make_sequence(PROMPT, 1))

    assert (first.reused, second.reused, plain.reused) == (0, 32, 32)


def test_a_checkpoint_without_a_tokenizer_reuses_as_well(tmp_path, host):
    base = make_loaded(make_qwen2(tmp_path, tokenizer=False), host)

    assert finished(warm(base), make_sequence(PROMPT, 1)).reused == 32
