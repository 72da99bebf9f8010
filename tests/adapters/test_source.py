"""Where adapters come from: folders, and a hub of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hubs import Client, held, write

from lorax_core.adapters.residency.source import FoundAdapter, find_adapter
from lorax_core.errors import AdapterError

FIND = """
import json, sys
from pathlib import Path
from lorax_core.adapters.residency.source import find_adapter
from lorax_core.errors import AdapterError

answers = []
for source, options in json.loads(sys.argv[1]):
    try:
        found = find_adapter(source, cache=Path("cache"), **options)
        answers.append({"folder": str(found.folder), "origin": found.origin, "revision": found.revision})
    except AdapterError as error:
        answers.append({"message": error.message, "hint": error.hint})
print(json.dumps(answers))
"""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: '{"r": 4}', WEIGHTS: "weights"}
BESIDE = {"README.md": "text", "optimizer.pt": "code", "checkpoint-5/adapter_config.json": "{}"}


@pytest.fixture
def client(hub, tmp_path) -> Client:
    (tmp_path / "home").mkdir()
    return Client(hub, tmp_path / "home", FIND)


def refused(source, **options):
    with pytest.raises(AdapterError) as caught:
        find_adapter(source, cache=Path("never made"), **options)
    return caught.value


# --- folders ---


def test_a_folder_is_itself_and_has_no_revision(tmp_path):
    assert find_adapter(tmp_path, cache=tmp_path / "cache") == FoundAdapter(tmp_path, str(tmp_path), None)
    assert find_adapter(str(tmp_path), cache=tmp_path / "cache") == FoundAdapter(tmp_path, str(tmp_path), None)


def test_a_revision_of_a_folder_is_refused(tmp_path):
    assert "is a folder, which has no revision 'v2'" in refused(tmp_path, revision="v2").message


def test_a_file_is_refused_with_its_folder(tmp_path):
    write(tmp_path, FILES)

    error = refused(tmp_path / WEIGHTS)

    assert "is a file; the folder of the adapter is needed" in error.message
    assert repr(str(tmp_path)) in error.hint


def test_a_folder_that_is_nearly_called_so_is_named(tmp_path):
    (tmp_path / "polite").mkdir()

    error = refused(tmp_path / "polit")

    assert repr(str(tmp_path / "polit")) in error.message
    assert f"did you mean {str(tmp_path / 'polite')!r}?" in error.hint


def test_what_is_nothing_is_refused_with_what_may_be_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    error = refused("no such thing")

    assert "'no such thing'" in error.message
    assert all(form in error.hint for form in ("folder", "'org/name'", "'s3://"))


def test_a_url_that_became_a_path_is_refused_with_the_text_to_give():
    assert "as text: 's3://bucket/lora'" in refused(Path("s3://bucket/lora")).hint


# --- the hub ---


def test_only_the_files_of_an_adapter_are_downloaded_and_the_commit_is_reported(hub, client, tmp_path):
    wanted = {**FILES, "adapter_model-00001-of-00002.safetensors": "half", "config.json": "{}"}
    commit = hub.add("acme/lora", write(tmp_path / "repo", {**wanted, **BESIDE}))

    found = client.find("acme/lora")

    assert (found["origin"], found["revision"]) == ("acme/lora", commit)
    assert held(found["folder"]) == wanted
    assert hub.downloaded() == wanted.keys()


def test_a_revision_is_fetched_by_its_name_and_one_that_is_not_there_is_refused(hub, client, tmp_path):
    hub.add("acme/lora", write(tmp_path / "new", FILES))
    commit = hub.add("acme/lora", write(tmp_path / "old", {**FILES, WEIGHTS: "old"}), revision="v1")

    old, unknown = client.run(FIND, ("acme/lora", {"revision": "v1"}), ("acme/lora", {"revision": "v9"}))

    assert held(old["folder"])[WEIGHTS] == "old"
    assert old["revision"] == commit
    assert "'acme/lora'" in unknown["message"]
    assert "at revision 'v9'" in unknown["message"]


def test_a_token_opens_a_private_adapter_and_its_lack_is_reported(hub, client, tmp_path):
    hub.add("acme/private", write(tmp_path / "repo", FILES), token="hf_right")

    without, wrong, right = client.run(
        FIND, ("acme/private", {}), ("acme/private", {"token": "hf_wrong"}), ("acme/private", {"token": "hf_right"})
    )

    assert held(right["folder"]) == FILES
    for refusal in (without, wrong):
        assert "'acme/private'" in refusal["message"]
        assert "token=" in refusal["hint"]
    assert "hf_wrong" not in wrong["message"]


def test_an_adapter_that_is_too_large_is_refused_before_it_is_downloaded(hub, client, tmp_path):
    hub.add("acme/lora", write(tmp_path / "repo", FILES))
    size = sum(map(len, FILES.values()))

    (large,) = client.run(FIND, ("acme/lora", {"max_bytes": size - 1}))
    before = hub.downloaded()
    (small,) = client.run(FIND, ("acme/lora", {"max_bytes": size}))

    assert f"'acme/lora' has {size} bytes" in large["message"]
    assert f"may have {size - 1}" in large["message"]
    assert before == set()
    assert held(small["folder"]) == FILES


def test_a_folder_that_is_too_large_is_refused_by_its_own_files(tmp_path):
    folder = write(tmp_path / "adapter", {**FILES, **BESIDE})
    size = sum(map(len, FILES.values()))

    assert f"has {size} bytes" in refused(folder, max_bytes=size - 1).message
    assert find_adapter(folder, cache=tmp_path, max_bytes=size).folder == folder


def test_offline_what_was_downloaded_is_the_answer_and_nobody_is_asked(hub, client, tmp_path):
    hub.add("acme/lora", write(tmp_path / "repo", FILES))
    first = client.find("acme/lora")
    hub.requests.clear()

    again, never = client.run(FIND, ("acme/lora", {}), ("acme/never", {}), environ={"HF_HUB_OFFLINE": "1"})

    assert again == first
    assert "'acme/never'" in never["message"]
    assert hub.requests == []


def test_a_hub_that_is_down_leaves_what_was_downloaded(hub, client, tmp_path):
    hub.add("acme/lora", write(tmp_path / "repo", FILES))
    first = client.find("acme/lora")
    hub.close()

    assert client.find("acme/lora") == first


def test_a_commit_that_was_downloaded_needs_no_hub(hub, client, tmp_path):
    commit = hub.add("acme/lora", write(tmp_path / "repo", FILES))
    first = client.find("acme/lora", revision=commit)
    hub.requests.clear()

    again = client.find("acme/lora", revision=commit)

    assert again == first
    assert hub.requests == []


def test_an_adapter_that_the_hub_has_only_as_a_pickle_is_refused_by_its_name(hub, client, tmp_path):
    hub.add("acme/old", write(tmp_path / "repo", {CONFIG: "{}", "adapter_model.bin": "code"}))

    refusal = client.find("acme/old")

    assert "'acme/old' has its weights only as pickles ('adapter_model.bin')" in refusal["message"]
    assert "PeftModel" in refusal["hint"]


def test_a_folder_of_a_similar_name_is_named_when_the_hub_has_none(hub, client):
    (client.home / "adapters/polite").mkdir(parents=True)

    refusal = client.find("adapters/polit")

    assert "did you mean 'adapters/polite'?" in refusal["hint"]
