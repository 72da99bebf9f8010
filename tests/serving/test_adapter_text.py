"""Tokenizers and chat templates that adapters bring: they serve the adapter's rows. The oracle is transformers."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from builders import (
    change_json,
    make_bert,
    make_bert_model,
    make_byte_tokenizer,
    make_letter_tokenizer,
    make_lora,
    make_qwen2,
    make_qwen2_model,
)
from matrix import ARCHS, HEADS, make_head_cell
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

import lorax_core as lorax
from lorax_core.errors import AdapterError, RequestError
from lorax_core.serving.adapter_text import AdapterTexts
from lorax_core.serving.text import TextFront

TERSE = "{% for message in messages %}{{ '<' + message['role'][0] + '>' + message['content'] }}{% endfor %}<a>"
CHAT = [{"role": "user", "content": "the cat in a hat"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_qwen2(tmp_path_factory.mktemp("text") / "base")


@pytest.fixture
def engine(base, host):
    with lorax.load(base, kv_cache_tokens=2048, host=host) as made:
        yield made


def make_adapter(folder, tokenizer=None, seed=1):
    make_lora(make_qwen2_model(), folder, seed, target_modules=["q_proj"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def prompt_ids(engine, prompt, adapter):
    """The ids that a prompt becomes, but for the first."""
    result = engine.generate(prompt, adapter=adapter, max_tokens=1, prompt_logprobs=0)
    return [one.token_id for one in result.prompt_logprobs[1:]]


def their_ids(folder):
    """What transformers makes of the chat with the tokenizer in a folder, but for the first id."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"][1:]


def test_chats_with_an_adapter_use_its_own_template_and_others_the_base_s(engine, base, tmp_path):
    engine.adapters.load("own", make_adapter(tmp_path / "own", make_byte_tokenizer(TERSE)))
    engine.adapters.load("plain", make_adapter(tmp_path / "plain", seed=2))
    asked = [
        lorax.GenerateRequest(prompt=CHAT, adapter=name, max_tokens=2, prompt_logprobs=0)
        for name in ("own", "plain", None)
    ]

    found = [[one.token_id for one in result.prompt_logprobs[1:]] for result in engine.run(asked)]

    assert found == [their_ids(tmp_path / "own"), their_ids(base), their_ids(base)]
    assert found[0] != found[1]


def in_a_file(folder):
    (folder / "chat_template.jinja").write_text(TERSE)


def in_the_configuration(folder):
    change_json(folder / "tokenizer_config.json", chat_template=TERSE)


def by_name(folder):
    both = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": TERSE}]
    change_json(folder / "tokenizer_config.json", chat_template=both)


@pytest.mark.parametrize("place", [in_a_file, in_the_configuration, by_name])
def test_a_template_alone_is_used_with_the_base_s_tokenizer(place, engine, tmp_path):
    folder = make_adapter(tmp_path / "own")
    place(folder)
    tokenizer = make_byte_tokenizer(TERSE)

    engine.adapters.load("own", folder)

    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert prompt_ids(engine, CHAT, "own") == tokenizer(text)["input_ids"][1:]


def test_a_tokenizer_with_more_tokens_reads_and_writes_its_rows(engine, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<hat>"), AddedToken("<turn>", special=True)], special_tokens=False)
    engine.adapters.load("own", make_adapter(tmp_path / "own", tokenizer))
    (hat,) = tokenizer("<hat>")["input_ids"]

    assert prompt_ids(engine, "a <hat> a", "own") == tokenizer("a <hat> a")["input_ids"][1:]
    assert hat not in prompt_ids(engine, "a <hat> a", None)
    assert [engine.count_tokens("a <hat> a", adapter=name) for name in ("own", None)] == [4, 8]
    assert [len(engine.tokenize("a <hat> a", adapter=name).ids) for name in ("own", None)] == [4, 8]
    assert [engine.detokenize([hat], adapter=name) for name in ("own", None)] == ["<hat>", ""]
    forced = {"max_tokens": 3, "logit_bias": {hat: 100.0}}
    own, other = engine.generate("a", adapter="own", **forced), engine.generate("a", **forced)
    assert own.token_ids == other.token_ids == [hat] * 3
    assert own.text == "<hat><hat><hat>"
    assert other.text == ""
    assert engine.generate("a", adapter="own", stop=["<hat>"], **forced).text == ""
    assert engine.generate("a", adapter="own", n=2, **forced).alternatives[0].text == own.text


def test_an_end_token_that_an_adapter_s_tokenizer_names_ends_its_answers(engine, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<turn>"})
    engine.adapters.load("own", make_adapter(tmp_path / "own", tokenizer))
    forced = {"max_tokens": 4, "logit_bias": {tokenizer.eos_token_id: 100.0}}

    assert engine.generate("a", adapter="own", **forced).token_ids == [tokenizer.eos_token_id]
    assert len(engine.generate("a", adapter="own", ignore_eos=True, **forced).token_ids) == 4
    assert len(engine.generate("a", **forced).token_ids) == 4


def test_a_constrained_answer_is_written_with_the_tokens_of_the_adapter_s_tokenizer(engine, base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("cat hat", normalized=False)])
    tokenizer.add_special_tokens({"eos_token": "<turn>"})
    engine.adapters.load("own", make_adapter(tmp_path / "own", tokenizer))
    (both,) = tokenizer("cat hat")["input_ids"]
    wanted = {"regex": "(cat hat){2}a?", "max_tokens": 30, "logit_bias": {both: 100.0, tokenizer.eos_token_id: 50.0}}

    own, plain = engine.generate("a", adapter="own", **wanted), engine.generate("a", **wanted)

    assert own.token_ids == [both, both, tokenizer.eos_token_id]
    assert own.text == "cat hatcat hat"
    assert plain.text.removesuffix("a") == own.text
    assert set(plain.token_ids).isdisjoint((both, tokenizer.eos_token_id))


def lowering(base, folder):
    """The tokenizer of a base, which reads capitals as small letters now, beside an adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.save_pretrained(folder)


def test_texts_to_embed_are_read_by_the_adapter_s_tokenizer(tmp_path, host):
    base = make_bert(tmp_path / "base")
    folder = make_lora(make_bert_model(), tmp_path / "own", target_modules=["query"])
    lowering(base, folder)

    with lorax.load(base, adapters={"own": folder}, host=host) as engine:
        asked = (("ABC", "own"), ("abc", "own"), ("ABC", None))
        upper, lower, other = engine.run([lorax.EmbedRequest(input=text, adapter=name) for text, name in asked])

    assert (upper.vector == lower.vector).all()
    assert (upper.vector != other.vector).any()


def test_texts_to_classify_and_rerank_are_read_by_the_adapter_s_tokenizer(tmp_path, host):
    arch = next(arch for arch in ARCHS if arch.name == "bert")
    model = arch.model()
    model.save_pretrained(tmp_path / "base")
    make_letter_tokenizer().save_pretrained(tmp_path / "base")
    folder, _ = make_head_cell(arch, model, HEADS["text to one number"], tmp_path / "own")
    shutil.copytree(folder, tmp_path / "plain")
    lowering(tmp_path / "base", folder)

    with lorax.load(tmp_path / "base", adapters={"own": folder, "plain": tmp_path / "plain"}, host=host) as engine:
        for name, alike in (("own", True), ("plain", False)):
            one, other = (engine.classify(text, adapter=name).scores for text in ("ABC", "abc"))
            assert (one == other) is alike
            upper, lower = (one.score for one in engine.rerank("AB", ["CDE", "cde"], adapter=name))
            assert (upper == lower) is alike


def test_another_vocabulary_is_refused_by_name(engine, tmp_path):
    folder = make_adapter(tmp_path / "own", make_byte_tokenizer())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    change_json(folder / "tokenizer.json", model={**model, "vocab": {**model["vocab"], "a": 98, "b": 97}})

    with pytest.raises(
        AdapterError, match=r"another vocabulary than the base's: .* 2 tokens .* \('a' 98 for 97, 'b'"
    ) as caught:
        engine.adapters.load("own", folder)

    assert "remove the files of its own" in caught.value.hint
    assert len(engine.adapters.list()) == 0
    assert prompt_ids(engine, "ab", None) == [98]


def broken(folder):
    (folder / "tokenizer.json").write_text("{")


def without_default(folder):
    change_json(folder / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "x"}])


def a_number(folder):
    change_json(folder / "tokenizer_config.json", chat_template=5)


def a_pipe(folder):
    os.mkfifo(folder / "chat_template.jinja")


BROKEN = {
    broken: "tokenizer in .* cannot be read",
    without_default: "names the chat templates 'tool_use', and none is 'default'",
    a_number: "has 5 for chat_template",
    a_pipe: "is not a regular file",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_files_that_cannot_be_read_are_refused_and_the_engine_goes_on(spoil, engine, tmp_path):
    folder = make_adapter(tmp_path / "own")
    spoil(folder)

    with pytest.raises(AdapterError, match=BROKEN[spoil]):
        engine.adapters.load("own", folder)

    assert prompt_ids(engine, "ab", None) == [98]


def test_a_template_that_fails_is_the_error_of_its_requests(engine, tmp_path):
    folder = make_adapter(tmp_path / "own")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no chats') }}")
    engine.adapters.load("own", folder)

    with pytest.raises(RequestError, match=r"the chat template refused .*no chats"):
        engine.generate(CHAT, adapter="own", max_tokens=1)

    assert len(engine.generate("a", adapter="own", max_tokens=1).token_ids) == 1


def test_a_weighted_sum_uses_the_template_that_all_members_share(engine, base, tmp_path):
    for name, template, seed in (("a", TERSE, 1), ("b", TERSE, 2), ("c", None, 3)):
        engine.adapters.load(
            name, make_adapter(tmp_path / name, make_byte_tokenizer(template) if template else None, seed)
        )

    assert prompt_ids(engine, CHAT, {"a": 0.5, "b": 0.5}) == their_ids(tmp_path / "a")
    assert prompt_ids(engine, CHAT, {"a": 0.5, "c": 0.5}) == their_ids(base)


def test_equal_numbers_with_other_templates_are_two_adapters(engine, base, tmp_path):
    engine.adapters.load("terse", make_adapter(tmp_path / "terse", make_byte_tokenizer(TERSE)))
    engine.adapters.load("plain", make_adapter(tmp_path / "plain"))

    assert prompt_ids(engine, CHAT, "terse") == their_ids(tmp_path / "terse")
    assert prompt_ids(engine, CHAT, "plain") == their_ids(base)
    one, other = engine.adapters.list()
    assert one.identity != other.identity


class Meddling(TextFront):
    """A base whose tokenizer is asked for while somebody writes to the folder of an adapter."""

    folder = None

    @property
    def tokenizer(self):
        (self.folder / "chat_template.jinja").write_text("another")
        return super().tokenizer


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TERSE)
    base = Meddling(make_byte_tokenizer())
    base.folder = tmp_path

    with pytest.raises(AdapterError, match="was changed while it was read"):
        AdapterTexts(base).read(tmp_path)


def test_a_merged_adapter_brings_its_template(base, tmp_path, host):
    folder = make_adapter(tmp_path / "own", make_byte_tokenizer(TERSE))

    with lorax.load(base, merge_adapter=folder, kv_cache_tokens=512, host=host) as engine:
        assert prompt_ids(engine, CHAT, None) == their_ids(folder)


def test_a_base_without_a_tokenizer_takes_ids_and_says_so(tmp_path, host, caplog):
    bare = make_qwen2(tmp_path / "bare", tokenizer=False)

    with lorax.load(bare, kv_cache_tokens=512, host=host) as engine:
        engine.adapters.load("own", make_adapter(tmp_path / "own", make_byte_tokenizer()))
        assert len(engine.generate([5, 9], adapter="own", max_tokens=2).token_ids) == 2

    assert "is not used: the base has none to compare it with" in caplog.text
