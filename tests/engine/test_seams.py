"""The line between host and device: a forward pass never crosses it, a step crosses it once, and what crosses is plain data."""

from __future__ import annotations

import pickle
from array import array

import pytest
import torch
from builders import make_lora, make_qwen2_model
from guards import HostTraffic, counted_transfers, no_host_traffic
from hypothesis import given
from hypothesis import strategies as st
from rigs import finish, make_adapters, make_loaded, make_loop, make_pool, make_sequence

from lorax_core.adapters.base import Bound
from lorax_core.adapters.deltas import (
    Dora,
    EmbeddingLowRank,
    LowRank,
    Replacement,
    Shift,
    TokenLogits,
    TokenRows,
)
from lorax_core.attention.torch import TorchBackend
from lorax_core.engine.plan import Chunk, StepPlan
from lorax_core.engine.runner import Runner
from lorax_core.engine.sampler import Sampled, uniform
from lorax_core.engine.sequence import Sampling, Sequence, TokenCounts
from lorax_core.engine.step_input import ChunkInput, HeadRead, SamplingRow, StepInput, step_input
from lorax_core.engine.transfer import Transfer
from lorax_core.modeling import Embedding, Linear
from lorax_core.plugins.resolve import load_cases
from lorax_core.testing.case import BASE, Case
from lorax_core.testing.lora import LoraOptions, linear_layers, write_adapter
from lorax_core.testing.packed import Share
from lorax_core.types import Pooling, Task

ARCHITECTURES = ("bert", "camembert", "gpt2", "gpt_neox", "qwen2", "roberta", "xlm-roberta")
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def base(qwen2, host):
    return make_loaded(qwen2, host)


# --- a forward pass ---


def make_case(host, model_type, folder):
    spec = host.architecture(model_type)
    return Case(spec, load_cases(spec, None), host, BASE, folder)


def make_mixed_batch(case, task):
    """A model, and a batch of chunks of several sequences, of the base and of two adapters, read by all of its heads."""
    loaded = case.loaded(task)
    layers = linear_layers(case.reference(task), case.account(task).ignored)
    folders = [
        write_adapter(layers, LoraOptions(rank=rank, alpha=8), case.folder / f"guard-{task}-{rank}", rank)
        for rank in (2, 3)
    ]
    store = make_adapters(loaded, one=folders[0], two=folders[1])
    one, two = (store.bound[store.get(name).identity] for name in ("one", "two"))
    adapters = [None, one, two, one]
    inputs = [case.inputs[at] for at in (1, 2, 3, 2)]
    bench = case.bench(loaded, inputs=inputs)
    shares = [
        Share(tokens, 0, len(tokens), pages, adapter)
        for tokens, pages, adapter in zip(inputs, bench.give_pages(inputs), adapters, strict=True)
    ]
    bench.run(bench.batch(shares))  # what is made once, at a site's first use, is made here
    return loaded.model, planned(bench, shares)


def make_decoding_batch(case):
    """A model that generates, and a batch of one token of each sequence, under adapters of every kind of delta."""
    loaded = case.loaded(Task.GENERATE)
    bounds = [None, *(Bound({path: (delta,)}) for path, delta in make_deltas(loaded.model))]
    inputs = [case.inputs[1 + at % 3] for at in range(len(bounds))]
    bench = case.bench(loaded, inputs=inputs)
    pages = bench.give_pages(inputs)
    whole = list(zip(inputs, pages, bounds, strict=True))
    bench.run(bench.batch([Share(tokens, 0, len(tokens), held, bound) for tokens, held, bound in whole]))
    return loaded.model, planned(
        bench, [Share(tokens, len(tokens) - 1, len(tokens), held, bound) for tokens, held, bound in whole]
    )


def make_deltas(model):
    """Every kind of delta at a site of its kind."""
    sites = model.sites
    tables = [path for path, site in sites.items() if isinstance(site, Embedding) and "position" not in path]
    path = next(path for path, site in sites.items() if isinstance(site, Linear) and site.bias is not None)
    table, layer = sites[tables[0]], sites[path]
    a, b = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
    ids = torch.tensor([0, 3])
    yield path, LowRank.whole(a, b, torch.ones(layer.out_features))
    yield path, Dora(a, b, torch.ones(layer.out_features))
    yield path, Shift(torch.ones(layer.out_features))
    yield path, Replacement(layer.dense_weight() + 1, None)
    yield tables[0], EmbeddingLowRank(torch.ones(table.in_features, 2), torch.ones(table.out_features, 2))
    yield tables[0], TokenRows(ids, torch.ones(2, table.out_features))
    yield "lm_head", TokenLogits(ids, torch.ones(2, table.out_features))


def planned(bench, shares):
    batch = bench.batch(shares)
    bench._plan(batch)
    return batch


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "qwen2"])
def test_a_decoding_pass_under_every_kind_of_adapter_does_neither(model_type, host, tmp_path):
    model, batch = make_decoding_batch(make_case(host, model_type, tmp_path))

    with no_host_traffic():
        output = model(batch)

    assert all(answers.isfinite().all() for answers in output.answers)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_forward_pass_neither_reads_tensors_nor_makes_them_of_host_values(model_type, host, tmp_path):
    case = make_case(host, model_type, tmp_path)
    for task in case.tasks:
        model, batch = make_mixed_batch(case, task)

        with no_host_traffic():
            output = model(batch)

        assert len(output.answers) == 1 + len(model.tasks)


PLANTED = {
    "a tensor of a list": lambda x: x + torch.tensor([1.0]),
    "as_tensor": lambda x: x + torch.as_tensor(2.0),
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x + len(x[0].tolist()),
    "numpy": lambda x: x + len(x.detach().numpy()),
    "cpu": lambda x: x.cpu(),
    "a truth value": lambda x: x if x.sum() > 0 else -x,
    "float": lambda x: x * float(x[0, 0]),
    "a mask as index": lambda x: x[x[:, 0] == x[:, 0]],
    "another device": lambda x: x + x.to("cpu"),
    "repeats from a tensor": lambda x: x + x[:, 0].repeat_interleave(torch.ones_like(x[:, 0]).long())[:, None],
    "an address of a storage": lambda x: x + (x.untyped_storage().data_ptr() and 0),
    "a wait for the device": lambda x: [x, torch.cuda.synchronize(None)][0],
    "bincount": lambda x: x + (x[:, 0] > 0).long().bincount().sum(),
    "unique_consecutive": lambda x: x + x[:, 0].unique_consecutive().sum(),
    "nonzero": lambda x: x + x.nonzero().shape[1],
    "an address": lambda x: x + (x.data_ptr() and 0),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_the_guard_of_forward_passes_finds_what_is_planted(planted, host, tmp_path):
    case = make_case(host, "qwen2", tmp_path)
    model, batch = make_mixed_batch(case, Task.GENERATE)
    usual = model.backbone.register_forward_hook(lambda module, inputs, output: planted(output))

    with no_host_traffic(), pytest.raises(HostTraffic):
        model(batch)

    usual.remove()
    with no_host_traffic():
        model(batch)


# --- a step ---

GREEDY = SamplingRow(Sampling(), 5)
ROWS = {
    "greedy": [GREEDY],
    "sampled": [
        GREEDY,
        SamplingRow(Sampling(temperature=1.0), 5),
        SamplingRow(Sampling(temperature=0.5, top_p=0.9), 5),
    ],
    "scored": [SamplingRow(Sampling(logprobs=3), 5), SamplingRow(Sampling(temperature=1.0, logprobs=0), 5)],
    "penalised": [SamplingRow(Sampling(repetition_penalty=1.2), 5, TokenCounts(PROMPT)), GREEDY],
    "constrained": [SamplingRow(Sampling(logit_bias=((3, 2.0),)), 5, banned=(4,), allowed=b"\xff" * 40)],
}


def make_runner(base, adapters=None):
    return Runner(base.model, TorchBackend(), make_pool(base, 16), adapters)


def make_chunk_input(number, row, *, tokens=PROMPT, start=0, **changes):
    fields = {
        "sequence": number,
        "start": start,
        "tokens": array("q", tokens),
        "reads": (HeadRead(Task.GENERATE, range(len(tokens) - 1, len(tokens))),),
        "pages": array("i", [number]),
        "sampled": (row,),
    }
    return ChunkInput(**{**fields, **changes})


def make_pooled_input(number, pooled=Task.EMBED):
    read = HeadRead(pooled, range(len(PROMPT)))
    return make_chunk_input(number, None, sampled=(), reads=(read,), task=pooled, pooled_rows=len(PROMPT))


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_step_is_read_back_in_one_transfer(base, rows):
    runner = make_runner(base)
    chunks = [make_chunk_input(at, row) for at, row in enumerate(rows, start=1)]
    scored = make_chunk_input(
        7, GREEDY, reads=(HeadRead(Task.GENERATE, range(5)),), scored=array("q", PROMPT[1:]), prompt_logprobs=2
    )
    step = StepInput((*chunks, scored, make_pooled_input(8)))

    with counted_transfers() as launched:
        pending = runner.launch(step)
    with counted_transfers() as read:
        answers = pending.result()

    assert launched == ["copy"]  # started at the end, and not waited for
    assert read == []
    assert sorted(answers) == [*range(1, len(rows) + 1), 7, 8]
    assert len(answers[7].prompt_scores) == 4
    assert answers[8].values.shape == (base.model.config.hidden_size,)


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (lambda tokens: tokens.tolist(), "tolist"),
        (lambda tokens: tokens.int().tolist(), "tolist"),
        (lambda tokens: tokens.numpy(), "numpy"),
    ],
)
def test_the_count_of_transfers_finds_one_that_is_planted(base, planted, named):
    pending = make_runner(base).launch(StepInput((make_chunk_input(1, GREEDY),)))

    with counted_transfers() as read:
        assert len(planted(pending._generated[0].sampled.tokens)) == 1
        pending.result()

    assert read == [named]


def test_filters_that_keep_more_than_was_looked_at_are_applied_to_the_whole_vocabulary():
    seeds = [seed for seed in range(20) if uniform(seed, 0, 7) > 0.5][:2]
    rows = [SamplingRow(Sampling(temperature=1.0, top_p=0.9, seed=seed, logprobs=1), 7) for seed in seeds]
    transfer = Transfer()
    with torch.inference_mode():  # as a step is launched; it is read outside
        logits = torch.zeros(2, 5000)
        sampled = Sampled(logits, rows, transfer)

    transfer.fetch()
    found = sampled.read()

    # Of equal logits the first tokens are the most likely, so 4,500 are kept and the drawn one is known, up to rounding.
    for seed, one in zip(seeds, found, strict=True):
        assert abs(one.token_id - uniform(seed, 0, 7) * 4500) < 2
        assert one.logprobs.token_id == one.token_id


def test_a_step_may_be_launched_with_tokens_of_the_step_before_that_the_host_has_not_seen(base):
    prompt, count = [9, 3, 7], 6
    expected = finish(make_loop(base), make_sequence(prompt, count))[0]
    runner = make_runner(base)
    pending = [runner.launch(StepInput((make_chunk_input(1, SamplingRow(Sampling(), 3), tokens=prompt),)))]
    for at in range(3, 2 + count):
        row = SamplingRow(Sampling(), at + 1)
        chunk = make_chunk_input(1, row, tokens=[0], start=at, awaits_token=True, restarted=False)
        pending.append(runner.launch(StepInput((chunk,))))

    tokens = [one.result()[1].sampled[0].token_id for one in pending]

    assert tokens == expected


# --- plain data ---


def make_plan(adapter=None):
    """A plan with everything that a sequence may have."""
    sampling = Sampling(temperature=0.7, top_k=3, repetition_penalty=1.1, logit_bias=((3, 1.0),), logprobs=2)
    generating = make_sequence(PROMPT, 9, sampling=sampling, adapter=adapter)
    generating.append(11)
    generating.draft = [12, 13]
    scored = make_sequence([4, 5], 3)
    scored.prompt_logprobs = 1
    pooled = Sequence(task=Task.EMBED, prompt=PROMPT, token_types=[0, 0, 1, 1, 1], span=range(1, 5))
    for number, sequence in enumerate((generating, scored, pooled), start=1):
        sequence.id, sequence.pages = number, array("i", [number])
    chunks = (Chunk(generating, 5, 3, 2), Chunk(scored, 0, 2), Chunk(pooled, 0, 5))
    return StepPlan(chunks, copies=((1, 2),), zeros=(3,))


def test_a_step_survives_pickling(base, tmp_path):
    store = make_adapters(base, one=make_lora(make_qwen2_model(), tmp_path))
    step = step_input(make_plan(store.get("one")), ended=[8, 9])

    again = pickle.loads(pickle.dumps(step))

    assert repr(strip(again)) == repr(strip(step))
    assert list(again.chunks[-1].sampled[0].counts.ids) == [*PROMPT, 11]
    assert list(again.chunks[-1].sampled[2].counts.counts) == [0] * 5 + [1, 1, 1]
    answers = [make_runner(base, store.bound).launch(one).result() for one in (step, again)]
    assert [one.token_id for one in answers[0][1].sampled] == [one.token_id for one in answers[1][1].sampled]


def strip(step):
    """A step without its counts, which are compared by their numbers."""
    rows = [[(row.sampling, row.position, row.banned, row.allowed) for row in chunk.sampled] for chunk in step.chunks]
    fields = [
        [getattr(chunk, name) for name in chunk.__dataclass_fields__ if name != "sampled"] for chunk in step.chunks
    ]
    return rows, fields, step.copies, step.zeros, step.ended


def test_a_pickled_step_holds_no_sequence(base):
    data = pickle.dumps(step_input(make_plan()))

    for name in (b"engine.sequence\x94\x8c\x08Sequence", b"Inbox", b"StopRule", b"Drafter", b"Grammar", b"_discard"):
        assert name not in data
    assert b"SamplingRow" in data


def test_a_step_does_not_change_with_the_sequences_that_it_was_made_of():
    plan = make_plan()
    step = step_input(plan)
    generating = plan.chunks[0].sequence
    chunk = step.chunks[0]
    before = list(chunk.tokens), list(chunk.pages), list(chunk.sampled[0].counts.counts)

    generating.append(11)
    generating.pages.append(9)
    generating.prompt[0] = 0

    assert (list(chunk.tokens), list(chunk.pages), list(chunk.sampled[0].counts.counts)) == before


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5)))
def test_running_counts_are_those_of_the_whole_sequence(prompt, output, drafts):
    counts = TokenCounts(prompt)
    for token in output:
        counts.add(token)

    now, ahead = counts.snapshot(), counts.snapshot(drafts)

    for found, tokens in ((now, output), (ahead, [*output, *drafts])):
        expected = {token: tokens.count(token) for token in {*prompt, *tokens}}
        assert dict(zip(found.ids, found.counts, strict=True)) == expected


def test_what_is_pooled_over_chunks_is_forgotten_with_its_sequence(base):
    runner = make_runner(base)
    base.model.head(Task.EMBED).pooling = Pooling.MEAN
    first = make_pooled_input(1)
    half = ChunkInput(
        sequence=1,
        start=0,
        tokens=first.tokens[:2],
        reads=(HeadRead(Task.EMBED, range(2)),),
        pages=first.pages,
        task=Task.EMBED,
    )

    runner.launch(StepInput((half,))).result()
    assert list(runner._pooled) == [1]
    runner.launch(StepInput((), ended=(1,))).result()

    assert runner._pooled == {}


def test_a_launch_that_fails_leaves_what_was_pooled_before(base):
    runner = make_runner(base)
    whole = make_pooled_input(1)
    [expected] = runner.launch(StepInput((whole,))).result().values()
    head, tail = whole.tokens[:2], whole.tokens[2:]
    part = make_pooled_input(2)
    fields = {name: getattr(part, name) for name in part.__dataclass_fields__}
    one = ChunkInput(**{**fields, "tokens": head, "reads": (HeadRead(Task.EMBED, range(2)),), "pooled_rows": None})
    two = ChunkInput(
        **{**fields, "tokens": tail, "start": 2, "reads": (HeadRead(Task.EMBED, range(3)),), "restarted": False}
    )
    runner.launch(StepInput((one,))).result()

    with pytest.raises(KeyError):
        runner.launch(StepInput((two, make_chunk_input(3, GREEDY, awaits_token=True))))
    [found] = runner.launch(StepInput((two,))).result().values()

    assert torch.allclose(torch.from_numpy(found.values), torch.from_numpy(expected.values), atol=1e-6)


def test_a_step_tells_its_numbers(base):
    loop = make_loop(base, pages=8)
    first, second = make_sequence(PROMPT, 3), make_sequence(PROMPT * 2, 3)
    loop.add(first)
    loop.step()
    loop.add(second)

    loop.step()

    stats = loop.last_step
    assert (stats.prompt_tokens, stats.decode_tokens, stats.draft_tokens, stats.rows) == (10, 1, 0, 2)
    assert (stats.running, stats.waiting, stats.pages_used, stats.pages) == (2, 0, 2, 8)
    assert stats.seconds > 0
    assert loop.totals.steps == 2


# --- one transfer ---


@given(st.lists(st.sampled_from([torch.bool, torch.int64, torch.float32]), max_size=6), st.integers(0, 5))
def test_a_transfer_gives_every_tensor_back(dtypes, size):
    tensors = [torch.arange(size * 2).view(size, 2).to(dtype) for dtype in dtypes]
    transfer = Transfer()
    numbers = [transfer.add(tensor) for tensor in tensors]

    transfer.fetch()

    for number, tensor in zip(numbers, tensors, strict=True):
        assert torch.equal(torch.from_numpy(transfer[number]), tensor)
        assert transfer[number].flags.aligned


def test_a_transfer_refuses_what_it_cannot_carry():
    with pytest.raises(TypeError, match=r"not torch\.bfloat16"):
        Transfer().add(torch.zeros(1, dtype=torch.bfloat16))


def test_fetching_twice_gives_the_same_arrays():
    transfer = Transfer()
    number = transfer.add(torch.arange(3))
    transfer.fetch()
    first = transfer[number]

    transfer.fetch()

    assert transfer[number] is first
    assert first.tolist() == [0, 1, 2]


def test_warming_up_leaves_the_scratch_page_empty(base):
    runner = make_runner(base)

    runner.warmup(40, 3)

    assert not runner._pool.data.any()
