from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from builders import make_bert, make_byte_tokenizer, make_lora, make_qwen2, make_qwen2_model, with_lora
from fakes import make_backend_spec, with_backends
from rigs import within

import lorax_core as lorax
from lorax_core.modeling.batch import Batch
from lorax_core.types import FinishReason

TOKENIZER = make_byte_tokenizer()
CHAT = [{"role": "user", "content": "hi"}]
BAD = 13  # the token that the stumbling backend breaks at


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_lora(make_qwen2_model(), tmp_path_factory.mktemp("adapter"), seed=5)


@pytest.fixture(scope="module")
def engine(qwen2, adapter):
    with lorax.load(qwen2, adapters={"it": adapter}, kv_cache_tokens=2048) as engine:
        yield engine


@pytest.fixture(scope="module")
def encoder(bert):
    with lorax.load(bert) as engine:
        yield engine


def ids_of(text):
    return TOKENIZER(text)["input_ids"]


def continued(prompt, count, model=None):
    """What transformers writes after a prompt."""
    model = model or make_qwen2_model()
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_one_prompt_gives_one_completion(engine):
    completion = engine.generate("hello", max_tokens=12, ignore_eos=True)

    assert completion.token_ids == continued(ids_of("hello"), 12)
    assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)
    assert completion.finish_reason is FinishReason.LENGTH
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(ids_of("hello")), 12)
    assert completion.usage.total_tokens == len(ids_of("hello")) + 12


def test_a_prompt_is_cut_to_its_last_tokens_where_a_request_asks_for_that(engine):
    for prompt in ("hello", ids_of("hello"), CHAT):
        cut = engine.generate(prompt, max_tokens=5, truncate_prompt_tokens=3, ignore_eos=True)
        whole = engine.generate(prompt, max_tokens=5, truncate_prompt_tokens=99, ignore_eos=True)

        ids = ids_of("user: hi\nassistant: ") if prompt is CHAT else ids_of("hello")
        assert cut.token_ids == continued(ids[-3:], 5)
        assert cut.usage.prompt_tokens == 3
        assert whole.token_ids == continued(ids, 5)


def test_tokens_that_stand_for_no_text_are_known(engine, encoder):
    assert 256 in engine.special_ids
    assert not engine.special_ids & set(range(256))
    assert encoder.tokenize("ab").special == [True, False, False, True]


def test_a_list_of_prompts_of_every_shape_gives_completions_in_order(engine):
    chat = [*ids_of("user: hi\nassistant: ")]

    completions = engine.generate(["hello", [5, 6, 7], CHAT, "hello"], max_tokens=8, ignore_eos=True)

    assert [one.token_ids for one in completions] == [
        continued(ids, 8) for ids in (ids_of("hello"), [5, 6, 7], chat, ids_of("hello"))
    ]


def test_a_list_of_one_is_still_a_list(engine):
    [completion] = engine.generate(["hello"], max_tokens=2)

    assert completion.token_ids == engine.generate("hello", max_tokens=2).token_ids


def test_no_prompts_give_no_results(engine, encoder):
    assert engine.generate([], max_tokens=3) == []
    assert list(engine.stream([], max_tokens=3)) == []
    assert engine.run([]) == []
    assert encoder.embed([]).shape == (0, 64)


def test_one_batch_mixes_the_base_and_an_adapter(engine, adapter):
    plain, adapted = engine.generate(["hello", "hello"], adapter=[None, "it"], max_tokens=10, ignore_eos=True)

    assert plain.token_ids == continued(ids_of("hello"), 10)
    assert adapted.token_ids == continued(ids_of("hello"), 10, with_lora(make_qwen2_model(), adapter))
    assert plain.token_ids != adapted.token_ids


def test_an_end_token_ends_a_completion_unless_it_is_ignored(engine):
    prompt = next([at, 9] for at in range(200) if 256 in continued([at, 9], 40))

    ended, ran_on = (engine.generate(prompt, max_tokens=40, ignore_eos=ignore) for ignore in (False, True))

    assert ended.finish_reason is FinishReason.STOP
    assert ended.token_ids == ran_on.token_ids[: ran_on.token_ids.index(256) + 1]
    assert ran_on.finish_reason is FinishReason.LENGTH


def test_without_a_limit_a_completion_runs_to_the_end_of_the_cache(qwen2):
    with lorax.load(qwen2, kv_cache_tokens=64) as engine:
        completion = engine.generate([5, 6, 7], ignore_eos=True)

    assert len(completion.token_ids) == 61
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_causal_model_embeds_its_last_row_unless_told_otherwise(qwen2):
    model = make_qwen2_model()
    with torch.inference_mode():
        rows = model.model(torch.tensor([ids_of("hello")])).last_hidden_state[0]

    with lorax.load(qwen2) as last, lorax.load(qwen2, pooling="mean", normalize=True) as mean:
        vectors = last.embed("hello"), mean.embed("hello")

    np.testing.assert_allclose(vectors[0], rows[-1], atol=1e-4)
    np.testing.assert_allclose(vectors[1], torch.nn.functional.normalize(rows.mean(0), dim=0), atol=1e-5)


def test_a_text_gives_a_vector_and_a_list_a_matrix(encoder):
    texts = ["ab", "a long one, longer than the others", "c"]

    matrix = encoder.embed(texts)

    assert matrix.shape == (3, 64)
    assert matrix.dtype == np.float32
    for text, row in zip(texts, matrix, strict=True):
        np.testing.assert_allclose(encoder.embed(text), row, atol=1e-6)
    assert encoder.embed(("ab", "c")).shape == (64,)
    assert encoder.embed([("ab", "c"), "ab", [2, 9, 3]]).shape == (3, 64)


def test_a_text_that_is_too_long_is_cut_as_asked_and_reported(encoder):
    long = "y " + "x " * 200  # 203 tokens with the specials, of which the model takes 96

    end, start, only_x, with_y = encoder.run(
        [
            lorax.EmbedRequest(input=long, truncate="end"),
            lorax.EmbedRequest(input=long, truncate="start"),
            lorax.EmbedRequest(input="x " * 94),
            lorax.EmbedRequest(input="y " + "x " * 93),
        ]
    )

    assert [one.truncated for one in (end, start, only_x, with_y)] == [True, True, False, False]
    assert end.usage.prompt_tokens == start.usage.prompt_tokens == 96
    np.testing.assert_allclose(end.vector, with_y.vector, atol=1e-6)
    np.testing.assert_allclose(start.vector, only_x.vector, atol=1e-6)
    assert np.abs(end.vector - start.vector).max() > 1e-3


def test_a_long_text_of_a_causal_model_is_embedded_in_chunks(qwen2):
    with lorax.load(qwen2, pooling="mean") as whole, lorax.load(qwen2, pooling="mean", max_batch_tokens=13) as chunked:
        texts = ["a text of some length " * 5, "short", "another one " * 9]

        np.testing.assert_allclose(chunked.embed(texts), whole.embed(texts), atol=1e-5)


def test_requests_of_every_task_share_a_batch(engine):
    requests = [
        lorax.GenerateRequest(prompt="hello", max_tokens=5),
        lorax.EmbedRequest(input="hello"),
        lorax.GenerateRequest(prompt="hello", max_tokens=3, adapter="it"),
        lorax.EmbedRequest(input="hello", adapter="it"),
    ]

    written, vector, adapted, other_vector = engine.run(requests)

    assert written.token_ids == engine.generate("hello", max_tokens=5).token_ids
    assert adapted.token_ids == engine.generate("hello", max_tokens=3, adapter="it").token_ids
    np.testing.assert_allclose(vector.vector, engine.embed("hello"), atol=1e-5)
    np.testing.assert_allclose(other_vector.vector, engine.embed("hello", adapter="it"), atol=1e-5)
    assert np.abs(vector.vector - other_vector.vector).max() > 0.01


def test_what_is_no_request_is_refused_and_nothing_is_started(engine):
    with pytest.raises(lorax.RequestError, match=r"requests are .* not dict"):
        engine.run([lorax.GenerateRequest(prompt="a"), {"prompt": "a"}])


def test_equal_seeds_give_equal_answers_alone_and_in_a_batch(engine):
    options = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}

    alone = engine.generate("hello", seed=7, **options)
    batch = engine.generate(["other", "hello", "more"], seed=7, **options)
    another = engine.generate("hello", seed=8, **options)

    assert batch[1].token_ids == alone.token_ids != another.token_ids


def test_unseeded_answers_differ_and_a_run_of_an_engine_can_be_repeated(qwen2):
    def run(seed):
        with lorax.load(qwen2, seed=seed, kv_cache_tokens=512) as engine:
            return [engine.generate("hello", temperature=1.5, max_tokens=12).token_ids for _ in range(3)]

    first = run(1)

    assert len({tuple(tokens) for tokens in first}) == 3
    assert run(1) == first
    assert run(2) != first


def test_an_engine_leaves_torchs_random_state_alone(engine):
    before = torch.random.get_rng_state()

    engine.generate("hello", temperature=1.0, max_tokens=3)

    assert torch.equal(torch.random.get_rng_state(), before)


def test_stop_strings_end_the_text(engine):
    whole = engine.generate("hello", max_tokens=30, ignore_eos=True)
    middle = whole.text[len(whole.text) // 2 :][:2]

    stopped = engine.generate("hello", max_tokens=30, ignore_eos=True, stop=["never seen", middle])

    assert stopped.text == whole.text[: whole.text.find(middle)]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_several_answers_to_a_prompt_are_each_a_draw_of_its_own(engine):
    options = {"temperature": 1.5, "max_tokens": 10, "ignore_eos": True, "seed": 3}

    several = engine.generate("hello", n=4, **options)
    greedy = engine.generate("hello", n=2, max_tokens=5)

    answers = [several, *several.alternatives]
    assert len({tuple(one.token_ids) for one in answers}) == 4
    assert several.token_ids == engine.generate("hello", **options).token_ids
    assert [one.token_ids for one in greedy.alternatives] == [greedy.token_ids]


@torch.inference_mode()
def test_logprobs_are_those_of_transformers(engine):
    completion = engine.generate("hello", max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    prompt = ids_of("hello")
    expected = make_qwen2_model()(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)

    for at, told in enumerate(completion.logprobs):
        row = expected[len(prompt) - 1 + at]
        assert told.token_id == completion.token_ids[at]
        assert told.logprob == pytest.approx(row[told.token_id].item(), abs=1e-3)
        assert list(told.top) == row.topk(3).indices.tolist()
    assert completion.prompt_logprobs[0] is None
    for at, told in enumerate(completion.prompt_logprobs[1:]):
        assert told.token_id == prompt[at + 1]
        assert told.logprob == pytest.approx(expected[at][prompt[at + 1]].item(), abs=1e-3)
        assert len(told.top) == 2


def test_two_engines_live_in_one_process(qwen2, tmp_path):
    other = make_qwen2(tmp_path, seed=9)
    alone = {}
    for folder in (qwen2, other):
        with lorax.load(folder, kv_cache_tokens=512) as engine:
            alone[folder] = engine.generate("hello", max_tokens=20).token_ids

    with (
        lorax.load(qwen2, kv_cache_tokens=512) as one,
        lorax.load(other, kv_cache_tokens=512) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        futures = [
            pool.submit(lambda engine=engine: [engine.generate("hello", max_tokens=20).token_ids for _ in range(5)])
            for engine in (one, two)
        ]
        found = [future.result(60) for future in futures]

    assert found == [[alone[qwen2]] * 5, [alone[other]] * 5]
    assert alone[qwen2] != alone[other]


def test_many_threads_may_call_one_engine(engine, encoder):
    expected = {at: engine.generate([at, 9], max_tokens=6).token_ids for at in range(8)}
    vectors = {at: encoder.embed("ab" * (at + 1)) for at in range(8)}

    def turn(number):
        at = number % 8
        same = np.allclose(encoder.embed("ab" * (at + 1)), vectors[at], atol=1e-6)
        return same and engine.generate([at, 9], max_tokens=6).token_ids == expected[at]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(turn, range(32)))


def test_of_a_call_that_fails_in_part_every_result_is_reported(qwen2, host):
    host = with_backends(host, make_backend_spec("stumbling", "StumblingBackend"))
    with lorax.load(qwen2, host=host, attention="stumbling", kv_cache_tokens=512) as engine:
        sound = engine.generate([5, 6], max_tokens=2).token_ids

        with pytest.raises(lorax.StepError) as caught:
            engine.generate([[5, 6], [5, BAD], [5, 6]], max_tokens=2)
        with pytest.raises(lorax.StepError) as alone:
            engine.generate([5, BAD], max_tokens=2)

        assert engine.generate([5, 6], max_tokens=2).token_ids == sound
    first, broken, last = caught.value.results
    assert first.token_ids == last.token_ids == sound
    assert isinstance(broken, lorax.StepError)
    assert "1 of 3 requests failed" in caught.value.message
    assert ".results" in caught.value.hint
    assert "a kernel broke" in str(alone.value)


def test_an_engine_that_is_closed_refuses_and_may_be_closed_again(qwen2):
    engine = lorax.load(qwen2, kv_cache_tokens=64)
    with engine:
        engine.generate([5], max_tokens=1)
    engine.close()

    with pytest.raises(lorax.RequestError, match="closed"):
        engine.generate([5], max_tokens=1)


def test_closing_ends_a_call_that_is_waiting(tmp_path):
    folder = make_qwen2(tmp_path, max_position_embeddings=50_000)
    engine = lorax.load(folder, kv_cache_tokens=50_000)
    stream = engine.stream([5], ignore_eos=True)
    next(stream)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine.generate, [6], ignore_eos=True)
        within(60, engine.close)

        assert isinstance(call.exception(60), lorax.LoraxError)
    with pytest.raises(lorax.LoraxError, match="closed"):
        within(60, lambda: list(stream))


def test_an_engine_shows_what_it_is_made_of(engine, encoder):
    info = engine.info()

    assert (info.model_type, info.dtype, info.device, info.attention) == ("qwen2", "float32", "cpu", "native")
    assert info.tasks == ("generate", "embed")
    assert (info.max_tokens, info.kv_cache_tokens) == (512, 2048)
    assert info.kv_cache_bytes == (2048 + 16) * 2 * 2 * 2 * 16 * 4  # with the scratch page
    assert encoder.info().kv_cache_tokens is None
    assert encoder.info().max_tokens == 96
    assert sum(info.linear_methods.values()) == 2 * 4 + 1  # four a layer, and the head that is tied to the embedding


def test_an_engine_may_be_warmed_up(tmp_path):
    for make, tokens in ((make_qwen2, 256), (make_bert, 96)):
        with lorax.load(make(tmp_path / make.__name__), kv_cache_tokens=256 if make is make_qwen2 else None) as engine:
            assert engine.warmup() == tokens
            assert engine.info().step_bytes is not None
            assert engine.info().lora_kernel == ("none", "no adapter has been loaded yet")


@pytest.mark.parametrize("limit", [16, 2048])
def test_prompt_logprobs_come_once_though_sequences_are_preempted(qwen2, limit):
    prompts = [[(7 * row + at) % 250 + 1 for at in range(20)] for row in range(4)]
    options = {"max_tokens": 100, "ignore_eos": True, "prompt_logprobs": 0}
    with lorax.load(qwen2, dtype="float32", kv_cache_tokens=4096) as roomy:
        expected = roomy.generate(prompts, **options)

    with lorax.load(qwen2, dtype="float32", kv_cache_tokens=192, max_batch_tokens=limit) as tight:
        found = tight.generate(prompts, **options)
        computed = tight.info().totals.prompt_tokens

    assert computed > 80  # some were preempted, and computed again
    for prompt, one, right in zip(prompts, found, expected, strict=True):
        assert one.token_ids == right.token_ids
        assert [told and told.token_id for told in one.prompt_logprobs] == [None, *prompt[1:]]


def test_a_step_is_freed_without_the_collector_of_garbage(engine):
    engine.generate(["a", "hello"], max_tokens=2)  # whatever is made once
    gc.collect()
    gc.disable()
    try:
        engine.generate(["a", "hello", "hello " * 8], max_tokens=6)
        left = [one for one in gc.get_objects() if type(one) is Batch]
    finally:
        gc.enable()

    assert len(left) <= 1  # at most the last one
