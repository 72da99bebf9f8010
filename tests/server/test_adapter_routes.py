"""Adapters over HTTP: loaded and dropped by clients with the admin key, bounded in size, counted."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from asking import ask

import lorax_core
from lorax_core.errors import AdapterError
from lorax_core.server.adapters import AdapterList, LoadedAdapter

KEY = "the-admin-key"
PROMPT = "The cat"


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "examples/tiny_qwen2"


@pytest.fixture
def engine(folder):
    with lorax_core.load(
        folder / "model", kv_cache_tokens=1_024, max_adapters=1, adapter_sources=["folder"], max_adapter_bytes=2**22
    ) as engine:
        yield engine


def send(client, engine, method, path, key=KEY, **options):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return ask(client(engine, admin_key=KEY), method, path, headers=headers, **options)


def test_an_adapter_is_loaded_listed_used_and_dropped(engine, client, folder):
    plain = engine.generate(PROMPT, max_tokens=6).text

    loaded = send(
        client, engine, "POST", "/v1/adapters", json={"name": "a/b", "source": str(folder / "adapters/upper")}
    )
    listed = send(client, engine, "GET", "/v1/adapters")
    one = send(client, engine, "GET", "/v1/adapters/a/b")
    answer = send(
        client,
        engine,
        "POST",
        "/generate",
        json={"inputs": PROMPT, "parameters": {"adapter_id": "a/b", "max_new_tokens": 6}},
    )
    dropped = send(client, engine, "DELETE", "/v1/adapters/a/b")
    gone = send(client, engine, "GET", "/v1/adapters/a/b")

    info = LoadedAdapter.model_validate(loaded.json())
    assert (info.name, info.kind, info.where) == ("a/b", "lora", "device")
    assert AdapterList.model_validate(listed.json()).adapters == [info]
    assert one.json() == loaded.json()
    assert answer.json()["generated_text"] != plain
    assert dropped.json() == {"name": "a/b", "unloaded": True}
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert engine.adapters.list() == []


def test_vllms_clients_load_and_drop_one(engine, client, folder):
    load = {"lora_name": "u", "lora_path": str(folder / "adapters/upper")}

    first = send(client, engine, "POST", "/v1/load_lora_adapter", json=load)
    again = send(client, engine, "POST", "/v1/load_lora_adapter", json=load)
    in_place = send(client, engine, "POST", "/v1/load_lora_adapter", json={**load, "load_inplace": True})
    dropped = send(client, engine, "POST", "/v1/unload_lora_adapter", json={"lora_name": "u"})
    gone = send(client, engine, "POST", "/v1/unload_lora_adapter", json={"lora_name": "u"})

    assert (first.status_code, first.text) == (200, "Success: LoRA adapter 'u' added successfully.")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert in_place.status_code == 200
    assert (dropped.status_code, dropped.text) == (200, "Success: LoRA adapter 'u' removed successfully.")
    assert gone.status_code == 404


def test_what_is_said_of_an_adapter_with_its_source_is_honoured(engine, client, folder, tmp_path):
    silent = shutil.copytree(folder / "adapters/topic", tmp_path / "silent")
    about = json.loads((silent / "adapter_config.json").read_text())
    (silent / "adapter_config.json").write_text(json.dumps({**about, "task_type": None}))
    names = {"0": "numbers", "1": "files", "2": "tests"}
    said = {"task": "sequence-classification", "id2label": names, "problem_type": "multi_label_classification"}

    loaded = send(client, engine, "POST", "/v1/adapters", json={"name": "t", "source": str(silent), **said})
    pinned = send(
        client, engine, "POST", "/v1/adapters", json={"name": "u", "source": str(silent), "pin": True, **said}
    )
    predicted = send(client, engine, "POST", "/tei/predict", json={"model": "t", "inputs": PROMPT})

    assert (loaded.json()["task"], loaded.json()["pinned"]) == ("sequence-classification", False)
    assert "of 1 slots on the device one must be left for others" in pinned.json()["error"]["message"]
    assert {one["label"] for one in predicted.json()} == set(names.values())
    # Of one label alone the scores would sum up to 1.
    assert sum(one["score"] for one in predicted.json()) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "route", ["/v1/adapters", "/v1/adapters/u", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
)
def test_only_the_admin_key_opens_these_routes(engine, client, route):
    for key in (None, "another-key"):
        for method in ("GET", "POST", "DELETE"):
            assert send(client, engine, method, route, key=key, json={}).status_code == 401
    assert ask(client(engine), "GET", route).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "base", "source": "x"}, "name"),
        ({"name": " ", "source": "x"}, "name"),
        ({"name": "a\r\nb", "source": "x"}, "name"),
        ({"name": "u"}, "source"),
        ({"name": "u", "source": "x", "id2label": {"a": "b"}}, "id2label"),
        ({"name": "u", "source": "x", "task": "translate"}, "task"),
        ({"name": "u", "source": "x", "max_bytes": 1}, "max_bytes"),
        ({"name": "u", "source": "no/such/folder"}, None),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(engine, client, body, param):
    answer = send(client, engine, "POST", "/v1/adapters", json=body)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_error_names_no_folder_of_this_machine(engine, client, tmp_path):
    answer = send(client, engine, "POST", "/v1/adapters", json={"name": "u", "source": str(tmp_path / "absent/x")})

    assert answer.status_code == 400
    assert str(tmp_path) not in answer.text


def test_clients_cannot_tell_what_is_on_the_disk_from_what_is_not(engine, client, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    names = [
        "file",
        "folder",
        "link",
        "nothing",
        "file/x",
        "folder/../file",
        "nothing/../file",
        "../../../../../usr/bin",
    ]
    sources = [*(f"{tmp_path}/{name}" for name in names), "/usr/bin", "/no-such/folder", "~root/x", "~no-such-user/x"]

    answers = {
        re.sub(r"'[./~][^']*'", "", ask(client(engine), "POST", "/generate", json=body(source)).text)
        for source in sources
    }

    assert len(answers) == 1, answers


def body(source):
    return {"inputs": PROMPT, "parameters": {"adapter_id": source}}


def test_what_clients_bring_is_bounded_in_size_and_what_the_operator_loads_is_not(engine, client, folder, tmp_path):
    large = shutil.copytree(folder / "adapters/upper", tmp_path / "large")
    size = sum(file.stat().st_size for file in large.iterdir())
    (large / "padding.json").write_text('"' + "x" * (2**22 - size) + '"')

    by_admin = send(client, engine, "POST", "/v1/adapters", json={"name": "u", "source": str(large)})
    by_request = send(
        client, engine, "POST", "/generate", json={"inputs": PROMPT, "parameters": {"adapter_id": str(large)}}
    )

    assert (by_admin.status_code, by_admin.json()["error"]["code"]) == (400, "bad_adapter")
    assert by_request.status_code == 422
    for answer in (by_admin, by_request):
        assert "4,194,304" in answer.text
    with pytest.raises(AdapterError, match="4,194,304"):
        engine.generate(PROMPT, adapter=str(large))
    assert engine.adapters.load("u", large).name == "u"


def test_metrics_count_adapters_that_come_and_those_that_make_room(engine, client, folder):
    for name in ("upper", "bullets"):
        engine.adapters.load(name, folder / "adapters" / name)
    for name in ("upper", "bullets", "upper"):
        engine.generate(PROMPT, max_tokens=1, adapter=name)

    text = send(client, engine, "GET", "/metrics").text

    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["lorax_adapters_loaded"]) == 2
    assert float(lines["lorax_adapter_loads_total"]) == engine.adapters.loads == 3
    assert float(lines["lorax_adapter_evictions_total"]) == engine.adapters.evictions == 2
