"""What makes a declaration sound."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from lorax_core.errors import PluginError
from lorax_core.plugins import ArchitectureCases, ArchitectureSpec, BackendSpec, Task
from lorax_core.plugins.resolve import load_class
from lorax_core.plugins.spec import API_VERSION, Incompatible

FULL = {
    "examples": ("somebody/stranger-base",),
    "features": ("token_types", "tied_embeddings"),
    "heads": {Task.EMBED: "lorax_stranger.modeling:StrangerHead"},
}


def make_backend_fields(**changes):
    fields = {"name": "fast", "summary": "A fast one.", "backend": "lorax_fast:Backend", "device_types": ("cuda",)}
    return {**fields, **changes}


def test_an_architecture_survives_json_and_pickle(spec_fields):
    spec = ArchitectureSpec(**spec_fields(**FULL))

    through_json = ArchitectureSpec.model_validate_json(spec.model_dump_json())
    through_pickle = pickle.loads(pickle.dumps(spec))

    assert through_json == through_pickle == spec
    assert through_json.tasks == (Task.EMBED,)


def make_case_fields(**changes):
    return {"tiny_config": {"hidden_size": 128}, "references": {Task.EMBED: "transformers:BertModel"}, **changes}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tiny_config": {"dtype": object}}, "not JSON"),
        ({"tiny_config": {"eps": float("nan")}}, "not JSON"),
        ({"variants": {"a b": {}}}, "'a b' is not a name"),
        ({"references": {"embed": "transformers.BertModel"}}, "is not a class path"),
        ({"references": {"embedd": "a:B"}}, "references.embedd"),
        ({"known_failures": {"paging": ""}}, "is not one line of text"),
        ({"tiny_confg": {}}, "Extra inputs are not permitted"),
    ],
)
def test_invalid_cases_are_refused_with_the_reason(changes, complaint):
    with pytest.raises(ValidationError) as caught:
        ArchitectureCases(**make_case_fields(**changes))

    assert complaint in str(caught.value)


@pytest.mark.parametrize("causal", [True, False])
def test_heads_are_core_s_unless_the_spec_names_another(causal, spec_fields):
    own = {"embed": "lorax_stranger.modeling:StrangerHead"}
    spec = ArchitectureSpec(**spec_fields(causal=causal, tasks=("embed", "token-classification"), heads=own))

    assert spec.head(Task.EMBED) == "lorax_stranger.modeling:StrangerHead"
    assert spec.head(Task.TOKEN_CLASSIFICATION) == "lorax_core.modeling.heads:TokenClassificationHead"
    with pytest.raises(PluginError, match="does not support 'generate'"):
        spec.head(Task.GENERATE)


def test_a_decoder_has_a_default_head_for_every_task(spec_fields):
    spec = ArchitectureSpec(**spec_fields(causal=True, tasks=tuple(Task)))

    for task in Task:
        head = load_class(spec.head(task), None)
        assert head.task is task


def test_a_backend_survives_json_and_pickle():
    spec = BackendSpec(**make_backend_fields(priority=10))

    assert BackendSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_cases_are_frozen_and_keep_apart_from_the_author_s_dicts():
    tiny = {"hidden_size": 128, "nested": {"heads": 2}}
    cases = ArchitectureCases(**make_case_fields(tiny_config=tiny))

    tiny["nested"]["heads"] = 3

    assert cases.tiny_config["nested"] == {"heads": 2}
    with pytest.raises(ValidationError, match="frozen"):
        cases.variants = {}


def test_a_spec_is_frozen(spec_fields):
    spec = ArchitectureSpec(**spec_fields())

    with pytest.raises(ValidationError, match="frozen"):
        spec.model_type = "other"


def test_cases_survive_json_and_pickle():
    cases = ArchitectureCases(**make_case_fields(variants={"wide": {"hidden_size": 256, "ratios": (1, 2)}}))

    assert ArchitectureCases.model_validate_json(cases.model_dump_json()) == cases
    assert pickle.loads(pickle.dumps(cases)) == cases
    assert cases.variants["wide"]["ratios"] == [1, 2]


def test_a_variant_changes_the_tiny_configuration():
    cases = ArchitectureCases(**make_case_fields(variants={"wide": {"hidden_size": 256}}))

    assert cases.config("wide") == {"hidden_size": 256}
    assert cases.config("base") == {"hidden_size": 128}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "no spaces"}, "'no spaces' is not a name"),
        ({"model_type": ""}, "'' is not a name"),
        ({"summary": "two\nlines"}, "is not one line of text"),
        ({"api": "1"}, "'1' is not an integer literal; write api=1"),
        ({"api": True}, "True is not an integer literal"),
        ({"config": "lorax_stranger.config.StrangerConfig"}, "write 'package.module:Class'"),
        ({"backbone": "lorax-stranger:Model"}, "write 'package.module:Class'"),
        ({"tasks": ()}, "at least 1 item"),
        ({"tasks": ("embedd",)}, "tasks.0"),
        ({"tasks": ("embed", "embed")}, "names a task twice"),
        ({"heads": {"embedd": "a:B"}}, "heads.embedd"),
        ({"tasks": ("embed", "generate")}, "the task 'generate' needs causal=True"),
        ({"heads": {"generate": "a:B"}}, "heads names 'generate', which is not one of its tasks: embed"),
        (
            {"tasks": ("embed", "sequence-classification")},
            "heads={Task.SEQUENCE_CLASSIFICATION: 'package.modeling:Class'}",
        ),
        ({"hf_architectures": {"StrangerModel": "embedd"}}, "hf_architectures.StrangerModel"),
        ({"default_task": "generate"}, "default_task 'generate' is not one of its tasks: embed"),
        ({"cases": "lorax_stranger.cases"}, "write 'package.module:NAME'"),
        ({"cases": None}, "Field required"),
        ({"features": ("lora",)}, "'token_types', 'sliding_window' or 'tied_embeddings'"),
        ({"causal": None}, "Field required"),
        ({"modle_type": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_an_invalid_architecture_is_refused_with_the_reason(spec_fields, changes, complaint):
    with pytest.raises(ValidationError) as caught:
        ArchitectureSpec(**spec_fields(**changes))

    assert complaint in str(caught.value)


@pytest.mark.parametrize(("api", "hint"), [(API_VERSION + 1, "upgrade lorax-core"), (API_VERSION - 1, "the plugin")])
def test_another_generation_of_the_api_is_told_before_its_unknown_fields(spec_fields, api, hint):
    with pytest.raises(Incompatible, match=f"plugin API {api}; this core implements {API_VERSION}") as caught:
        ArchitectureSpec(**spec_fields(api=api, field_of_the_future=1))

    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "-"}, "'-' is not a name"),
        ({"backend": "Backend"}, "write 'package.module:Class'"),
        ({"device_types": ()}, "at least 1 item"),
        ({"priority": "high"}, "valid integer"),
        ({"speed": 1}, "Extra inputs are not permitted"),
    ],
)
def test_an_unsound_backend_is_refused_with_the_reason(changes, complaint):
    with pytest.raises(ValidationError) as caught:
        BackendSpec(**make_backend_fields(**changes))

    assert complaint in str(caught.value)
