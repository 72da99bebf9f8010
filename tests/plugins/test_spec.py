"""What makes a declaration sound."""

from __future__ import annotations

import pickle

import pytest
from pydantic import ValidationError

from lorax_core.plugins import ArchitectureSpec, BackendSpec, Task
from lorax_core.plugins.spec import API_VERSION, Incompatible

FULL = {
    "examples": ("somebody/stranger-base",),
    "features": ("token_types", "tied_embeddings"),
    "tiny_variants": {"wide": {"hidden_size": 256, "ratios": (1, 2)}},
    "references": {Task.EMBED: "transformers:BertModel"},
    "known_failures": {"chunking": "bidirectional"},
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
    assert through_json.tiny_variants["wide"]["ratios"] == [1, 2]


def test_a_backend_survives_json_and_pickle():
    spec = BackendSpec(**make_backend_fields(priority=10))

    assert BackendSpec.model_validate_json(spec.model_dump_json()) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_spec_is_frozen_and_keeps_apart_from_the_author_s_dicts(spec_fields):
    tiny = {"hidden_size": 128, "nested": {"heads": 2}}
    spec = ArchitectureSpec(**spec_fields(tiny_config=tiny))

    tiny["nested"]["heads"] = 3

    assert spec.tiny_config["nested"] == {"heads": 2}
    with pytest.raises(ValidationError, match="frozen"):
        spec.model_type = "other"


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
        ({"heads": {}}, "at least 1 item"),
        ({"heads": {"embedd": "a:B"}}, "heads.embedd"),
        ({"heads": {"embed": "a:B", "generate": "a:B"}}, "a head for 'generate' needs causal=True"),
        ({"hf_architectures": {"StrangerModel": "embedd"}}, "hf_architectures.StrangerModel"),
        ({"default_task": "generate"}, "default_task 'generate' has no head; heads are for: embed"),
        ({"references": {"generate": "a:B"}}, "references names task 'generate', which has no head"),
        ({"features": ("lora",)}, "'token_types', 'sliding_window' or 'tied_embeddings'"),
        ({"tiny_config": {"dtype": object}}, "not JSON"),
        ({"tiny_config": {"eps": float("nan")}}, "not JSON"),
        ({"tiny_variants": {"a b": {}}}, "'a b' is not a name"),
        ({"known_failures": {"paging": ""}}, "is not one line of text"),
        ({"causal": None}, "Field required"),
        ({"modle_type": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_an_unsound_architecture_is_refused_with_the_reason(spec_fields, changes, complaint):
    with pytest.raises(ValidationError) as caught:
        ArchitectureSpec(**spec_fields(**changes))

    assert complaint in str(caught.value)


@pytest.mark.parametrize(("api", "hint"), [(API_VERSION + 1, "upgrade lorax-core"), (API_VERSION - 1, "the plugin")])
def test_another_generation_of_the_api_is_told_before_its_unknown_fields(spec_fields, api, hint):
    with pytest.raises(Incompatible, match=f"plugin API {api}; this core speaks {API_VERSION}") as caught:
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
