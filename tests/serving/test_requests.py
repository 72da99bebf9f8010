from __future__ import annotations

import math

import pytest

from lorax_core.errors import RequestError
from lorax_core.serving.requests import ClassifyRequest, EmbedRequest, GenerateRequest, is_single, make_requests

CHAT = [{"role": "user", "content": "hello"}]


def refusal(kind, **options):
    with pytest.raises(RequestError) as caught:
        kind(**options)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "option", "meant"),
    [
        (GenerateRequest, "temprature", "temperature"),
        (GenerateRequest, "max_token", "max_tokens"),
        (GenerateRequest, "topp", "top_p"),
        (EmbedRequest, "truncation", "truncate"),
        (ClassifyRequest, "adaptor", "adapter"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(kind, option, meant):
    needed = {"prompt": "a"} if kind is GenerateRequest else {"input": "a"}

    error = refusal(kind, **needed, **{option: 1})

    assert error.message == f"{kind.__name__} has no option {option!r}"
    assert error.hint == f"did you mean {meant!r}?"


def test_an_option_like_no_other_is_refused_with_those_there_are():
    error = refusal(EmbedRequest, input="a", qqq=1)

    assert "'input', 'adapter', 'truncate'" in error.hint


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_tokens", ["8", True, 0, -1, 2.5, []]),
        ("min_tokens", [-1, "2", None]),
        ("temperature", ["hot", "0.5", True, -0.1, 101, NAN, INF, None]),
        ("top_k", [0, -3, 1.5, "5", False]),
        ("top_p", [0, -0.1, 1.01, NAN, "much"]),
        ("min_p", [-0.1, 1.5, NAN]),
        ("typical_p", [0, 1.5, NAN]),
        ("repetition_penalty", [0, -1, 101, NAN]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN]),
        ("logit_bias", [{"a": 1.0}, {5: 101}, {5: NAN}, [5]]),
        ("seed", [1.5, "7", True]),
        ("n", [0, -1, 129, 2.0]),
        ("stop", ["", ["a", ""], 3, [3]]),
        ("stop_token_ids", [3, ["a"], [1.5]]),
        ("ignore_eos", ["yes", 1, None]),
        ("logprobs", [-1, 101, "3"]),
        ("prompt_logprobs", [-1, 101]),
        ("adapter", [3, ["a"], b"a"]),
        ("prompt", [None, 3, 2.5, b"bytes", [1.5], [None], {"role": "user"}, ("a", "b"), [True, 2]]),
        ("priority", [101, "high"]),
    ],
)
def test_a_value_of_the_wrong_kind_or_size_is_refused_by_option_and_value(option, values):
    for value in values:
        error = refusal(GenerateRequest, **{"prompt": "a", option: value})

        assert error.message.startswith(f"{option}: "), error.message
        assert "(found " in error.message


@pytest.mark.parametrize("value", [None, 3, [1.5], ("a",), ("a", "b", "c"), ("a", 3), CHAT, [False]])
def test_a_text_of_no_known_shape_is_refused(value):
    for kind in (EmbedRequest, ClassifyRequest):
        assert refusal(kind, input=value).message.startswith("input: ")


@pytest.mark.parametrize("value", ["left", "", None, True])
def test_a_truncation_that_does_not_exist_is_refused_with_those_that_do(value):
    error = refusal(EmbedRequest, input="a", truncate=value)

    assert "'error', 'start' or 'end'" in error.message


def test_every_wrong_option_is_told_at_once():
    error = refusal(GenerateRequest, prompt="a", max_tokens=0, top_p=2, topk=3)

    assert all(part in error.message for part in ("max_tokens: ", "top_p: ", "no option 'topk'"))
    assert error.hint == "did you mean 'top_k'?"


def test_options_that_contradict_each_other_are_refused():
    assert (
        "min_tokens 5 is more than max_tokens 3"
        in refusal(GenerateRequest, prompt="a", min_tokens=5, max_tokens=3).message
    )
    assert "exclude each other" in refusal(GenerateRequest, prompt="a", regex="a", choice=["b"]).message


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"stop": []}, {"stop": []}),
        ({"stop": None}, {"stop": []}),
        ({"logit_bias": {"17": 1.0}}, {"logit_bias": {17: 1.0}}),
        ({"max_tokens": None}, {"max_tokens": None}),
        ({"seed": -5}, {"seed": -5}),
        ({"prompt": CHAT}, {"prompt": CHAT}),
        ({"prompt": [1, 2]}, {"prompt": [1, 2]}),
    ],
)
def test_sound_options_are_taken(given, kept):
    request = GenerateRequest(**{"prompt": "a", **given})

    assert {name: getattr(request, name) for name in kept} == kept


def test_a_request_does_not_change():
    request = EmbedRequest(input="a")

    with pytest.raises(ValueError, match="frozen"):
        request.input = "b"


@pytest.mark.parametrize(
    ("prompts", "single"),
    [
        ("text", True),
        ("", True),
        ([1, 2, 3], True),
        (CHAT, True),
        (("a", "b"), True),
        ([], False),
        (["text"], False),
        ([[1, 2], [3]], False),
        ([CHAT, CHAT], False),
        ([("a", "b"), "c"], False),
        ([[]], False),
        (["a", [1, 2]], False),
    ],
)
def test_one_prompt_is_told_from_a_list_of_them(prompts, single):
    assert is_single(prompts) is single


@pytest.mark.parametrize("prompts", [None, 3, b"bytes", {"a": 1}, {"a", "b"}, iter(["a"])])
def test_what_is_neither_a_prompt_nor_a_list_is_refused_with_what_is(prompts):
    with pytest.raises(RequestError) as caught:
        is_single(prompts)

    assert type(prompts).__name__ in caught.value.message
    assert "list of those is a batch" in caught.value.message


def test_one_adapter_is_for_all_prompts_and_a_list_for_each():
    def adapters(given):
        return [request.adapter for request in make_requests(GenerateRequest, "prompt", ["a", "b"], given, {})[0]]

    assert adapters("x") == ["x", "x"]
    assert adapters(None) == [None, None]
    assert adapters(["x", None]) == ["x", None]


@pytest.mark.parametrize(("prompts", "adapters"), [(["a", "b"], ["x"]), ("a", ["x", "y"]), ([], ["x"])])
def test_a_list_of_adapters_of_another_length_is_refused_with_both_numbers(prompts, adapters):
    with pytest.raises(RequestError) as caught:
        make_requests(GenerateRequest, "prompt", prompts, adapters, {})

    count = 1 if prompts == "a" else len(prompts)
    assert caught.value.message.startswith(f"{len(adapters)} adapters were named for {count} prompts")
