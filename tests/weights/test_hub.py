from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_qwen2
from hubs import HANG_UP, Client, held
from hubs import write as written

import lorax_core as lorax
from lorax_core.errors import CheckpointError
from lorax_core.weights.hub import find_checkpoint

FIND = """
import json, sys
from lorax_core.errors import CheckpointError
from lorax_core.weights.hub import find_checkpoint

answers = []
for source, options in json.loads(sys.argv[1]):
    try:
        answers.append({"folder": str(find_checkpoint(source, **options))})
    except CheckpointError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""
LOAD = """
import json, sys
import lorax_core as lorax

answers = []
for source, options in json.loads(sys.argv[1]):
    with lorax.load(source, kv_cache_tokens=64, **options) as engine:
        answers.append(list(engine.generate("the", max_tokens=8).token_ids))
print(json.dumps(answers))
"""
SMALL = {"config.json": "{}", "model.safetensors": "weights"}


@pytest.fixture
def client(hub, tmp_path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", FIND)


def write(folder, files=SMALL):
    return written(folder, files)


def generated(folder: Path) -> list[int]:
    with lorax.load(folder, kv_cache_tokens=64) as engine:
        return list(engine.generate("the", max_tokens=8).token_ids)


def test_a_folder_is_itself(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_file_is_refused_with_its_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()

    with pytest.raises(CheckpointError, match="is a file") as caught:
        find_checkpoint(file)

    assert str(tmp_path) in caught.value.hint


def test_a_folder_that_is_nearly_called_so_is_named(tmp_path):
    (tmp_path / "qwen2-small").mkdir()
    wrong = str(tmp_path / "qwen2-smal")

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(wrong)

    assert f"did you mean {str(tmp_path / 'qwen2-small')!r}?" in caught.value.hint


@pytest.mark.parametrize(
    "source", ["./nowhere", "no-such-folder", "/no/such/folder", "a/b/c", "some where/else", "-x/y"]
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_with_both_forms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message
    assert "config.json" in caught.value.hint
    assert "Qwen/" in caught.value.hint


@pytest.mark.parametrize("source", ["acme/two--dashes", "acme/dots..dots", "acme/ends-", "acme/" + "x" * 100])
def test_an_id_that_the_hub_cannot_have_is_a_checkpoint_error_too(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(source)

    assert repr(source) in caught.value.message


def test_offline_an_id_that_was_never_downloaded_is_told_with_what_to_try_and_the_hub_is_not_asked(
    hub, client, tmp_path
):
    hub.add("acme/tiny", write(tmp_path / "repo"))

    plain, revised = client.run(
        FIND, ("acme/tiny", {}), ("acme/tiny", {"revision": "v2"}), environ={"HF_HUB_OFFLINE": "1"}
    )

    assert "there is no checkpoint folder 'acme/tiny' here, and the hub did not give it: " in plain["message"]
    assert "the hub did not give it at revision 'v2': " in revised["message"]
    assert "offline, only what was downloaded before" in plain["hint"]
    assert hub.requests == []


def test_an_id_and_its_revisions_generate_what_their_folders_do(hub, client, qwen2, tmp_path):
    other = make_qwen2(tmp_path / "other", seed=5)
    hub.add("acme/tiny", qwen2)
    hub.add("acme/tiny", other, revision="v2")

    plain, revised = client.run(LOAD, ("acme/tiny", {}), ("acme/tiny", {"revision": "v2"}))

    assert plain == generated(qwen2)
    assert revised == generated(other) != plain


def test_offline_an_id_that_was_downloaded_is_answered_from_the_cache(hub, client, qwen2):
    hub.add("acme/tiny", qwen2)
    client.find("acme/tiny")
    hub.close()

    found = client.find("acme/tiny", environ={"HF_HUB_OFFLINE": "1"})

    assert generated(Path(found["folder"])) == generated(qwen2)


def test_a_hub_that_is_down_leaves_what_was_downloaded(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))
    first = client.find("acme/tiny")
    hub.close()

    again, never = client.run(FIND, ("acme/tiny", {}), ("acme/never-seen", {}))

    assert again == first
    assert "'acme/never-seen'" in never["message"]
    assert "only what was downloaded before" in never["hint"]


def test_a_second_look_downloads_no_file_again(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))
    first = client.find("acme/tiny")
    hub.requests.clear()

    again = client.find("acme/tiny")

    assert again == first
    assert hub.requests  # whether main moved is asked
    assert hub.downloaded() == set()


def test_main_that_moved_is_downloaded_and_its_commit_before_stays(hub, client, tmp_path):
    before = hub.add("acme/tiny", write(tmp_path / "before", {"config.json": "1"}))
    client.find("acme/tiny")
    hub.add("acme/tiny", write(tmp_path / "after", {"config.json": "2"}))

    moved, pinned = client.run(FIND, ("acme/tiny", {}), ("acme/tiny", {"revision": before}))

    assert held(moved["folder"]) == {"config.json": "2"}
    assert held(pinned["folder"]) == {"config.json": "1"}


def test_a_token_opens_a_private_model_and_goes_with_every_request_for_it(hub, client, tmp_path):
    hub.add("acme/private", write(tmp_path / "repo"), token="hf_right")

    found = client.find("acme/private", token="hf_right")

    assert held(found["folder"]) == SMALL
    assert {r.token for r in hub.requests if "acme/private" in r.path} == {"hf_right"}


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 403)])
def test_a_private_model_without_the_right_token_is_refused_with_its_id_and_the_option(
    hub, client, tmp_path, token, status
):
    hub.add("acme/private", write(tmp_path / "repo"), token="hf_right")

    refused = client.find("acme/private", token=token)

    assert "'acme/private'" in refused["message"]
    assert "token=" in refused["hint"]
    assert {r.status for r in hub.requests if "acme/private" in r.path} == {status}
    assert token is None or token not in refused["message"]


def test_an_unknown_id_is_refused_by_its_name(hub, client):
    refused = client.find("acme/no-such-model")

    assert "'acme/no-such-model'" in refused["message"]
    assert "spelling" in refused["hint"]
    assert {r.status for r in hub.requests if "acme/" in r.path} == {404}


def test_an_unknown_revision_is_refused_with_id_and_revision(hub, client, tmp_path):
    hub.add("acme/tiny", write(tmp_path / "repo"))

    refused = client.find("acme/tiny", revision="v9")

    assert "'acme/tiny'" in refused["message"]
    assert "at revision 'v9'" in refused["message"]


def test_a_hub_that_answers_nonsense_is_a_checkpoint_error_too(hub, client):
    hub.pages = {"acme/hangs-up": b"", "acme/portal": b"<html>Log in to the network</html>"}

    hung_up, portal = client.run(FIND, ("acme/hangs-up", {}), ("acme/portal", {}))

    assert "'acme/hangs-up' here, and the hub did not give it" in hung_up["message"]
    assert "'acme/portal' here, and the hub did not give it" in portal["message"]
    assert {r.status for r in hub.requests if "/acme/" in r.path} == {HANG_UP, 200}


def test_an_endpoint_that_is_no_address_is_a_checkpoint_error_too(client):
    refused = client.find("acme/tiny", environ={"HF_ENDPOINT": "hub.example"})

    assert "the hub did not give it" in refused["message"]


def test_only_files_that_loading_reads_are_downloaded(hub, client, tmp_path):
    wanted = {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense_1024/model.safetensors",
    }
    unwanted = {
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "2_Dense/pytorch_model.bin",
        "onnx/config.json",
        "onnx/model.onnx",
        "checkpoint-500/model.safetensors",
        "original/tokenizer.model",
    }
    hub.add("acme/full", write(tmp_path / "repo", {name: f"this is {name}" for name in wanted | unwanted}))

    found = client.find("acme/full")

    assert held(found["folder"]).keys() == wanted
    assert hub.downloaded() == wanted


def test_a_model_that_the_hub_has_only_as_pickles_is_refused_by_their_names(hub, client, tmp_path):
    hub.add("acme/old", write(tmp_path / "repo", {"config.json": "{}", "pytorch_model.bin": "code", "a.md": "text"}))

    refused = client.find("acme/old")

    assert "'acme/old' has its weights only as pickles ('pytorch_model.bin')" in refused["message"]
    assert "save_pretrained" in refused["hint"]
    assert hub.downloaded() == {"config.json"}


def test_pickles_beside_safetensors_are_left_alone(hub, client, tmp_path):
    hub.add("acme/both", write(tmp_path / "repo", {**SMALL, "pytorch_model.bin": "code"}))

    found = client.find("acme/both")

    assert held(found["folder"]) == SMALL


def test_a_folder_has_no_revisions(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v2'"):
        find_checkpoint(tmp_path, revision="v2")
