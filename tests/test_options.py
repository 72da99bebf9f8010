"""`EngineOptions`: plain data, checked where it is made, with errors that teach."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path

import pytest
from pydantic import SecretStr

from lorax_core.errors import RequestError
from lorax_core.options import AdapterOptions, EngineOptions
from lorax_core.types import Pooling

EVERYTHING = {
    "checkpoint": "org/model",
    "revision": "main",
    "token": "s3cret",
    "dtype": "bfloat16",
    "device": "cpu",
    "adapters": {"a": "org/adapter"},
    "merge_adapter": "org/merged",
    "max_adapters": 4,
    "max_cpu_adapters": 9,
    "adapter_sources": ("hub", "/srv/adapters"),
    "max_fetched_adapters": 3,
    "adapter_timeout": 9.5,
    "max_adapter_bytes": 10**9,
    "pooling": "mean",
    "normalize": True,
    "embedding_dim": 256,
    "kv_cache_fraction": 0.5,
    "kv_dtype": "fp8_e4m3",
    "max_batch_tokens": 64,
    "max_batch_rows": 8,
    "attention": "torch",
    "quantize": "int8",
    "linear_methods": {"layers.*": "plain"},
    "cuda_graphs": False,
    "speculate": 3,
    "threads": 2,
    "seed": 7,
}


def refusal(**options):
    with pytest.raises(RequestError) as caught:
        EngineOptions(**{"checkpoint": "m", **options})
    return caught.value


def test_options_survive_pickling_with_their_secret():
    options = EngineOptions(**EVERYTHING)

    again = pickle.loads(pickle.dumps(options))

    assert again == options
    assert again.token.get_secret_value() == "s3cret"
    assert set(EVERYTHING) | {"kv_cache_tokens", "kv_cache_pages", "kv_cache_bytes"} == set(EngineOptions.model_fields)


def test_a_token_is_never_shown():
    options = EngineOptions(**EVERYTHING)

    for shown in (repr(options), str(options), options.model_dump_json(), str(refusal(token=["s3cret"]))):
        assert "s3cret" not in shown
    assert EngineOptions(checkpoint="m", token=SecretStr("s3cret")).token == options.token


@pytest.mark.parametrize(
    "options",
    [
        {"token": b"s3cret"},
        {"tokn": "s3cret"},
        {"token": "s3cret", "max_cpu_adapters": 1},
        {"token": "s3cret", "checkpoint": 5},
        {"token": "s3cret", "adapters": "a"},
    ],
)
def test_a_token_is_in_no_traceback(options):
    shown = "".join(traceback.format_exception(refusal(**options)))

    assert "s3cret" not in shown


def test_a_missing_option_is_named_without_the_others():
    others = {"token": "s3cret"}

    with pytest.raises(RequestError) as caught:
        EngineOptions(**others)

    assert caught.value.message == "checkpoint: Field required"
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_paths_and_members_of_enumerations_become_text():
    options = EngineOptions(checkpoint=Path("m"), adapters={"a": Path("folder") / "a"}, pooling=Pooling.MEAN)

    assert (options.checkpoint, options.adapters) == ("m", {"a": str(Path("folder") / "a")})
    assert type(options.pooling) is str
    assert EngineOptions(checkpoint="m", adapters=None).adapters == {}


def test_an_adapter_may_come_with_what_its_files_do_not_say():
    said = {"source": Path("folder"), "id2label": {"0": "no", 1: "yes"}, "token": "secret"}

    options = EngineOptions(checkpoint="m", adapters={"a": said, "b": AdapterOptions(source="org/b", pin=True)})

    assert options.adapters["a"] == AdapterOptions(source="folder", id2label={0: "no", 1: "yes"}, token="secret")
    assert options.adapters["b"].pin
    assert "secret" not in repr(options)
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"source": "a", "id2lable": {}}, "did you mean 'id2label'?"),
        ({"id2label": {0: "no"}}, "source: Field required"),
        ({"source": "a", "id2label": {"none": "no"}}, "id2label"),
        ({"source": "a", "id2label": {"٣": "no"}}, "id2label"),
        ({1: 2}, "adapters"),
        ({"source": "a", "token": 7}, "a secret is a string, not int"),
    ],
)
def test_what_is_said_of_an_adapter_is_checked(adapter, told):
    with pytest.raises(RequestError) as caught:
        EngineOptions(checkpoint="m", adapters={"a": adapter})

    assert told in str(caught.value)


def test_a_whole_number_is_a_fraction_too():
    assert EngineOptions(checkpoint="m", kv_cache_fraction=1).kv_cache_fraction == 1.0


def test_options_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        EngineOptions(checkpoint="m").seed = 3


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"kv_cache_token": 5}, "EngineOptions has no option 'kv_cache_token'", "did you mean 'kv_cache_tokens'?"),
        ({"zzzzzz": 5}, "EngineOptions has no option 'zzzzzz'", "options are 'checkpoint'"),
        ({"dtype": "bfloat61"}, "dtype: Input should be 'auto'", "did you mean 'bfloat16'?"),
        ({"pooling": "men"}, "pooling: Input should be 'cls'", "did you mean 'mean'?"),
        ({"seed": "x"}, "seed: Input should be a valid integer (found 'x')", None),
        ({"threads": True}, "threads: Input should be a valid integer (found True)", None),
        ({"checkpoint": 5}, "checkpoint: Input should be a valid string (found 5)", None),
        ({"checkpoint": ""}, "checkpoint: Input should be a folder or a hub id, not empty", None),
        ({"adapters": ["a"]}, "adapters: Input should be a valid dictionary", None),
        ({"adapters": {"a": 5}}, "adapters.a: Input should be a valid string (found 5)", None),
        ({"adapters": {" ": "b"}}, "adapters: an adapter's name must not be empty", None),
        ({"token": 5}, "token: a secret is a string, not int", None),
        ({"kv_cache_tokens": 1, "kv_cache_bytes": 1}, "'kv_cache_tokens', 'kv_cache_bytes' exclude each other", None),
        ({"max_cpu_adapters": 1}, "max_cpu_adapters needs max_adapters", None),
        ({"kv_cache_fraction": True}, "kv_cache_fraction: Input should be a valid number (found True)", None),
        ({"kv_cache_fraction": "0.5"}, "kv_cache_fraction: Input should be a valid number (found '0.5')", None),
        ({"kv_cache_fraction": float("nan")}, "kv_cache_fraction: Input should be", None),
        ({"max_batch_rows": float("nan")}, "max_batch_rows: Input should be a valid integer (found nan)", None),
        ({"max_batch_tokens": float("inf")}, "max_batch_tokens: Input should be a valid integer (found inf)", None),
        ({"adapter_timeout": float("nan")}, "adapter_timeout: Input should be", None),
    ],
)
def test_what_is_wrong_is_named_with_what_is_valid(options, message, hint):
    error = refusal(**options)

    assert message in error.message
    assert hint is None or error.hint.startswith(hint)


def test_several_wrong_options_are_named_together():
    message = refusal(threads=0, max_batch_rows=0, speculate=-1).message

    assert message.count("greater than or equal to") == 3
