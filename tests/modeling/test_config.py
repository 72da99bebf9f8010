from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from pydantic import field_validator

from lorax_core.errors import CheckpointError
from lorax_core.modeling import ModelConfig

SOUND = {"model_type": "x", "hidden_size": 8, "vocab_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_keys_that_inference_does_not_need_are_left_alone():
    config = ModelConfig.parse({**SOUND, "initializer_range": 0.02, "use_cache": True})

    assert config.hidden_size == 8


def test_every_field_that_is_missing_or_wrong_is_named_with_its_value():
    raw = {**SOUND, "hidden_size": "wide"}
    del raw["vocab_size"]

    with pytest.raises(CheckpointError) as caught:
        ModelConfig.parse(raw)

    assert "hidden_size" in caught.value.message
    assert "'wide'" in caught.value.message
    assert "vocab_size" in caught.value.message


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused(field, value):
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.parse({**SOUND, field: value})

    assert field in caught.value.message
    assert str(value) in caught.value.message


def test_a_configuration_does_not_change():
    config = ModelConfig.parse(SOUND)

    with pytest.raises(ValueError, match="frozen"):
        config.hidden_size = 9


class Renamed(ModelConfig):
    aliases: ClassVar[Mapping[str, str]] = {"n_embd": "hidden_size", "n_head": "num_attention_heads"}


class Own(ModelConfig):
    own_keys: ClassVar[Mapping[str, str]] = {"act": "hidden_act"}
    hidden_act: str = "gelu"


class Wide(ModelConfig):
    own_head_dim: ClassVar[bool] = True


OWN = {"model_type": "x", "n_embd": 8, "n_head": 2, "vocab_size": 5, "num_hidden_layers": 1}


def test_an_architectures_own_keys_become_the_common_ones():
    config = Renamed.parse(OWN)

    assert (config.hidden_size, config.num_attention_heads) == (8, 2)


@pytest.mark.parametrize("stated", [None, 16])
def test_the_common_key_wins_where_a_file_states_both(stated):
    config = Renamed.parse({**OWN, "hidden_size": stated})

    assert config.hidden_size == (stated or 8)


@pytest.mark.parametrize(
    ("kind", "raw", "told"),
    [
        (Renamed, {**OWN, "n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
        (Renamed, {**SOUND, "num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        (Renamed, {**OWN, "num_attention_heads": 3}, "n_embd 8 is not a multiple of num_attention_heads 3"),
        (ModelConfig, {**SOUND, "num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
        (Renamed, {**OWN, "n_embd": "wide"}, "n_embd: .*'wide'"),
        (Renamed, {key: value for key, value in OWN.items() if key != "n_head"}, "n_head: Field required"),
    ],
)
def test_errors_name_a_key_as_the_file_spells_it(kind, raw, told):
    with pytest.raises(CheckpointError, match=told):
        kind.parse(raw)


def test_heads_with_a_size_of_their_own_need_not_share_the_width():
    assert Wide.parse({**SOUND, "num_attention_heads": 3}).num_attention_heads == 3


def test_a_plugin_that_reads_what_the_file_lacks_is_named():
    class Eager(ModelConfig):
        @classmethod
        def normalise(cls, raw):
            return {**raw, "head_dim": raw["hidden_size"] // raw["num_attention_heads"]}

    with pytest.raises(CheckpointError, match=r"Eager\.normalise failed with KeyError: 'hidden_size'"):
        Eager.parse({"model_type": "eager"})


class Typed(ModelConfig):
    eps: float = 1e-6
    window: int | None = 4
    tied: bool = False
    act: str = "gelu"
    kinds: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", True),
        ("hidden_size", "8"),
        ("window", False),
        ("window", 2**63),
        ("hidden_size", 10**400),
        ("window", "4"),
        ("eps", True),
        ("eps", "1e-6"),
        ("eps", float("nan")),
        ("eps", float("inf")),
        ("eps", 10**400),
        ("tied", "false"),
        ("tied", 0),
        ("act", 5),
        ("act", ["gelu"]),
        ("kinds", "full"),
        ("kinds", [1]),
        ("id2label", {"x": "a"}),
        ("id2label", ["a"]),
        ("num_labels", -1),
        ("num_labels", 10**8),
    ],
)
def test_a_value_of_another_type_than_the_field_is_refused(field, value):
    with pytest.raises(CheckpointError) as caught:
        Typed.parse({**SOUND, field: value})

    assert field in caught.value.message
    assert "config.json" in caught.value.hint


def test_a_value_that_json_spells_otherwise_than_python_is_read():
    config = Typed.parse(
        {**SOUND, "eps": 1, "kinds": ["full"], "id2label": {"10": "b", "9": "a"}, "problem_type": "regression"}
    )

    assert (config.eps, config.kinds, config.labels, config.problem.value) == (1.0, ("full",), ("a", "b"), "regression")


def test_what_is_not_read_may_hold_anything():
    assert Typed.parse({**SOUND, "time_step_limit": [0.0, float("inf")], "seed": 10**30}).hidden_size == 8


@pytest.mark.parametrize(
    ("keys", "read"),
    [({"act": "relu"}, "relu"), ({"act": "relu", "hidden_act": "silu"}, "relu"), ({"hidden_act": "silu"}, "gelu")],
)
def test_of_a_key_with_one_name_the_common_one_is_not_read(keys, read):
    assert Own.parse({**SOUND, **keys}).hidden_act == read


def test_a_key_with_one_name_is_named_in_errors():
    with pytest.raises(CheckpointError, match=r"act: .*found 5"):
        Own.parse({**SOUND, "act": 5, "hidden_act": "silu"})


@pytest.mark.parametrize("layers", [10_001, 10**9, 10**30])
def test_more_layers_than_any_model_has_are_refused_before_a_plugin_lists_them(layers):
    class Listed(ModelConfig):
        aliases: ClassVar[Mapping[str, str]] = {"n_layer": "num_hidden_layers"}

        @classmethod
        def normalise(cls, raw):
            raise AssertionError(f"a list of {raw['num_hidden_layers']}")

    raw = {key: value for key, value in SOUND.items() if key != "num_hidden_layers"}

    with pytest.raises(CheckpointError, match=rf"{layers} for n_layer; at most 10,000"):
        Listed.parse({**raw, "n_layer": layers})


def test_of_many_wrong_fields_the_first_are_named():
    with pytest.raises(CheckpointError) as caught:
        Typed.parse({**SOUND, "kinds": [0] * 1000})

    assert "kinds.0" in caught.value.message
    assert "and 992 more" in caught.value.message
    assert len(caught.value.message) < 1000


def test_what_a_plugins_validator_says_stands_alone():
    class Refusing(ModelConfig):
        @field_validator("vocab_size")
        @classmethod
        def _even(cls, value):
            raise ValueError("an odd vocabulary is not supported")

    with pytest.raises(CheckpointError) as caught:
        Refusing.parse(SOUND)

    assert "vocab_size: an odd vocabulary is not supported (found 5)" in caught.value.message


@pytest.mark.parametrize("error", [KeyError("no"), TypeError("no"), ZeroDivisionError("no")])
def test_a_plugin_that_cannot_normalise_what_it_was_given_is_named(error):
    class Failing(ModelConfig):
        @classmethod
        def normalise(cls, raw):
            raise error

    with pytest.raises(CheckpointError, match=rf"Failing\.normalise failed with {type(error).__name__}: '?no"):
        Failing.parse(SOUND)


def test_a_plugin_whose_fields_are_no_json_is_named():
    class Odd(ModelConfig):
        @classmethod
        def normalise(cls, raw):
            return {**raw, "act": object()}

    with pytest.raises(CheckpointError, match=r"Odd\.normalise failed with"):
        Odd.parse(SOUND)


def test_one_class_of_several_is_not_the_answer_to_one_class():
    with pytest.raises(CheckpointError, match="single_label_classification"):
        ModelConfig.parse({**SOUND, "problem_type": "single_label_classification", "num_labels": 1})
