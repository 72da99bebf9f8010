"""The checkpoint that ships with the repository, beside transformers and PEFT: numbers first, then text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rigs import Bench, all_logits, make_adapters, make_loaded
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax_core as lorax

SHIPPED = Path(__file__).resolve().parents[2] / "examples/tiny_qwen2"
ADAPTERS = {"upper": SHIPPED / "adapters/upper", "bullets": SHIPPED / "adapters/bullets"}
PROMPTS = [
    "The list of files",
    "If the file does not exist",
    "A string is",
    "This method is called when the",
    "x",
]
TOKENS = 100
NAMES = [None, *ADAPTERS]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED / "model")


@pytest.fixture(scope="module")
def oracles():
    """The base and, by name, the base with each adapter; each is a model of its own."""
    from builders import with_lora

    made = {None: AutoModelForCausalLM.from_pretrained(SHIPPED / "model").eval()}
    for name, folder in ADAPTERS.items():
        made[name] = with_lora(AutoModelForCausalLM.from_pretrained(SHIPPED / "model"), folder)
    return made


@pytest.fixture(scope="module")
def base(host):
    return make_loaded(SHIPPED / "model", host)


@pytest.fixture(scope="module")
def store(base):
    return make_adapters(base, **ADAPTERS)


@pytest.fixture(scope="module")
def engine(host):
    with lorax.load(SHIPPED / "model", adapters=ADAPTERS, host=host, kv_cache_tokens=8192) as engine:
        yield engine


@pytest.fixture(scope="module")
def written(oracles, tokenizer):
    """What transformers and PEFT write greedily after each prompt, by adapter."""
    return {(name, prompt): greedy(model, tokenizer, prompt) for name, model in oracles.items() for prompt in PROMPTS}


def greedy(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(
        **ids, max_new_tokens=TOKENS, min_new_tokens=None, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, ids["input_ids"].shape[1] :].tolist()


def ids_of(tokenizer):
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@torch.inference_mode()
def oracle_logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_within_a_ten_thousandth_of_the_oracles(base, store, oracles, tokenizer, written, name):
    # A prompt and a hundred tokens of text, so that late positions count as well.
    prompts = [ids + written[name, prompt] for ids, prompt in zip(ids_of(tokenizer), PROMPTS, strict=True)]
    adapter = store.get(name) if name else None

    found = all_logits(base, prompts, [adapter] * len(prompts))

    for logits, ids in zip(found, prompts, strict=True):
        assert (logits - oracle_logits(oracles[name], ids)).abs().max() < 1e-4


def test_logits_of_a_mixed_batch_are_those_of_each_oracle(base, store, oracles, tokenizer):
    names = [None, "upper", "bullets", "upper", None]

    found = all_logits(base, ids_of(tokenizer), [store.get(name) if name else None for name in names])

    for logits, ids, name in zip(found, ids_of(tokenizer), names, strict=True):
        assert (logits - oracle_logits(oracles[name], ids)).abs().max() < 1e-4


def test_logits_do_not_depend_on_how_a_prompt_is_cut_into_chunks(base, oracles, tokenizer, written):
    ids = ids_of(tokenizer)[0] + written[None, PROMPTS[0]]
    other = ids_of(tokenizer)[1] * 6
    bench = Bench(base, page_size=16)
    first, second = bench.sequence(ids), bench.sequence(other)
    edges = [0, 7, 8, 9, 40, 41, 42, len(ids)]

    pieces = []
    for start, stop in pairwise(edges):
        pieces.append(bench.logits((first, start, stop), (second, start // 4, max(stop // 4, start // 4 + 1)))[0])

    assert (torch.cat(pieces) - oracle_logits(oracles[None], ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_hundred_greedy_tokens_are_the_oracles_when_a_prompt_is_alone(engine, written, name):
    for prompt in PROMPTS:
        completion = engine.generate(prompt, adapter=name, max_tokens=TOKENS, ignore_eos=True)

        assert completion.token_ids == written[name, prompt]


def test_a_hundred_greedy_tokens_are_the_oracles_in_one_mixed_batch(engine, written, tokenizer):
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]

    completions = engine.generate(
        [prompt for _, prompt in asked], adapter=[name for name, _ in asked], max_tokens=TOKENS, ignore_eos=True
    )

    assert [one.token_ids for one in completions] == [written[key] for key in asked]
    for completion in completions:
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_a_stream_of_three_shows_what_each_adapter_does(engine, written, tokenizer):
    texts = {0: "", 1: "", 2: ""}

    for event in engine.stream([PROMPTS[0]] * 3, adapter=NAMES, max_tokens=TOKENS, ignore_eos=True):
        texts[event.index] += event.text

    assert list(texts.values()) == [
        tokenizer.decode(written[name, PROMPTS[0]], skip_special_tokens=True) for name in NAMES
    ]
    assert len(set(texts.values())) == 3


def test_text_goes_on_in_the_same_way_beside_an_adapter_that_is_loaded_and_unloaded(engine, written):
    stream = engine.stream(PROMPTS[0], adapter="upper", max_tokens=TOKENS, ignore_eos=True)
    next(stream)

    engine.adapters.load("again", ADAPTERS["bullets"])
    engine.adapters.unload("again")
    *_, last = stream

    assert last.completion.token_ids == written["upper", PROMPTS[0]]
