"""What happens to every request: ids, keys, bounds of bodies, errors in the shape of their API."""

from __future__ import annotations

import asyncio
import logging

import pytest
from asking import ask
from fastapi.responses import PlainTextResponse
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel

from lorax_core.errors import AdapterError, CapacityError, LoraxError, RequestError, StepError
from lorax_core.server.app import build_app
from lorax_core.server.auth import ApiKeys
from lorax_core.server.errors import KINDS, Refused, body_of, failure, without_paths
from lorax_core.server.logs import TextLines
from lorax_core.server.metrics import ADAPTER_LABELS, Metrics
from lorax_core.server.middleware import EveryRequest
from lorax_core.server.names import base_name
from lorax_core.server.options import ServerOptions
from lorax_core.types import Completion, FinishReason, Usage


class Sorry(BaseModel):
    """What a route answers when it fails."""

    why: str


def test_a_request_keeps_its_plain_id_and_gets_another_for_one_that_could_forge_a_log(qwen2, client):
    plain = ask(client(qwen2), "GET", "/health", headers={"X-Request-Id": "abc-1"})
    forged = ask(client(qwen2), "GET", "/health", headers={"X-Request-Id": "a b\tstatus=200"})

    assert plain.headers["x-request-id"] == "abc-1"
    assert len(forged.headers["x-request-id"]) == 32


async def body_of_drops(**options):
    """What a body ends with that comes in small pieces, and never ends."""

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"", "more_body": True}

    async def app(scope, receive, send):
        for _ in range(200_000):
            await receive()

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    every = EveryRequest(
        app, options=ServerOptions(**options), metrics=Metrics(None)
    )  # of no engine: nothing reads them
    await every(scope, receive, send)
    return [message["status"] for message in sent if "status" in message]


def test_a_body_that_comes_in_drops_has_no_more_time_than_another():
    assert asyncio.run(body_of_drops(body_timeout=0.3)) == [408]


def test_a_body_may_be_as_large_as_the_limit(qwen2, client):
    body = b'{"inputs": "a"}'

    def status(size):
        sent = {"content": body.ljust(size), "headers": {"Content-Type": "application/json"}}
        return ask(client(qwen2, max_body_bytes=64), "POST", "/tokenize", **sent).status_code

    assert [status(64), status(65)] == [200, 413]


@pytest.mark.parametrize(
    ("path", "found"), [("/v1/nothing", "not_found"), ("/tei/nothing", "NotFound"), ("/nothing", "not_found")]
)
def test_an_unknown_route_is_answered_in_the_shape_of_its_api(qwen2, client, path, found):
    answer = ask(client(qwen2), "POST", path)

    body = answer.json()
    assert answer.status_code == 404
    assert (body["error"]["code"] if path.startswith("/v1/") else body["error_type"]) == found


def test_a_wrong_method_is_answered_with_those_that_a_route_takes(qwen2, client):
    answer = ask(client(qwen2), "POST", "/v1/models")

    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"


def test_keys_open_what_they_are_for():
    options = ServerOptions(api_keys=["first-key-1", "second-key-2"], admin_key="admin-key-3")
    keys = ApiKeys(options.api_keys, options.admin_key)

    for path, key, allowed in [
        ("/health", None, True),
        ("/ready", None, True),
        ("/v1/models", None, False),
        ("/v1/models", "first-key-1", True),
        ("/v1/models", "second-key-2", True),
        ("/v1/models", "second-key-", False),
        ("/v1/models", "admin-key-3", True),
        ("/v1/adapters", "first-key-1", False),
        ("/v1/adapters/name", "admin-key-3", True),
    ]:
        header = None if key is None else f"Bearer {key}"
        if allowed:
            keys.check("GET", path, header)
        else:
            with pytest.raises(Refused) as caught:
                keys.check("GET", path, header)
            assert caught.value.kind == "unauthorized"


def test_a_scheme_may_be_written_in_any_case_and_is_that_of_keys():
    keys = ApiKeys(ServerOptions(api_keys=["first-key-1"]).api_keys)

    keys.check("GET", "/v1/models", "bearer first-key-1")

    with pytest.raises(Refused, match="another key came"):
        keys.check("GET", "/v1/models", "Basic first-key-1")


def test_without_an_admin_key_adapters_cannot_be_changed():
    with pytest.raises(Refused, match="no admin key") as caught:
        ApiKeys().check("GET", "/v1/adapters", None)

    assert caught.value.kind == "no_route"


def test_a_page_of_an_allowed_origin_may_send_its_key_and_read_why_it_was_refused(qwen2, client):
    options = {"cors_origins": ["https://page.example"], "api_keys": ["the-secret-key"]}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}

    here = {"Origin": "https://page.example"}
    preflight = ask(client(qwen2, **options), "OPTIONS", "/v1/embeddings", headers={**here, **asks})
    refused = ask(client(qwen2, **options), "POST", "/v1/embeddings", headers=here, json={"input": "a"})
    other = ask(client(qwen2, **options), "OPTIONS", "/v1/embeddings", headers={"Origin": "https://other", **asks})

    assert preflight.status_code == 200
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert refused.status_code == 401
    assert {one.headers["access-control-allow-origin"] for one in (preflight, refused)} == {"https://page.example"}
    assert "access-control-allow-origin" not in other.headers


def test_a_key_is_in_no_answer_and_no_log(qwen2, client, caplog):
    with caplog.at_level(logging.DEBUG):
        answer = ask(
            client(qwen2, api_keys=["the-secret-key"]),
            "GET",
            "/metrics",
            headers={"Authorization": "Bearer wrong-key-x"},
        )

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not any(key in answer.text + caplog.text for key in ("the-secret-key", "wrong-key-x"))


def test_every_error_has_a_status_and_says_nothing_of_this_machine(tmp_path):
    inner = AdapterError(f"no file in '{tmp_path}/adapter'", hint="look")
    errors = [
        RequestError("x", hint="y"),
        CapacityError("x", hint="y"),
        inner,
        LoraxError("x"),
        StepError("some failed", results=[inner, None]),
        Refused("overloaded", "x", retry_after=3),
        ValueError(f"secret {tmp_path}"),
    ]

    found = [failure(error) for error in errors]

    assert [one.kind for one in found] == [
        "invalid", "too_long", "bad_adapter", "internal", "bad_adapter", "overloaded", "internal",
    ]  # fmt: skip
    for one in found:
        kind = KINDS[one.kind]
        for path, expected in (("/v1/x", kind.status), ("/generate", kind.lorax_status), ("/tei/x", kind.tei_status)):
            status, body = body_of(path, one)
            assert status == expected
            assert str(tmp_path) not in str(body)
    assert found[5].headers == {"Retry-After": "3"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file '/tmp/a/b.json'", "no file '.../b.json'"),
        ("see ~/models/x", "see .../x"),
        ("GET /v1/models lists them", "GET /v1/models lists them"),
        ("org/name is not there", "org/name is not there"),
        ("https://host/tmp/x", "https://host/tmp/x"),
    ],
)
def test_folders_are_cut_from_paths_and_routes_stay(text, shown):
    assert without_paths(text) == shown


def test_the_document_says_that_failures_are_json_and_of_what_a_stream_has_events(qwen2):
    app = build_app(qwen2)
    stream = {"text/event-stream": {"schema": {"type": "string", "description": "pieces"}}}

    @app.get("/stream", response_class=PlainTextResponse, responses={200: {"content": stream}, 400: {"model": Sorry}})
    async def route():
        return "nothing"

    found = app.openapi()["paths"]["/stream"]["get"]["responses"]

    assert list(found["400"]["content"]) == ["application/json"]
    assert found["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/Sorry")
    event = found["200"]["content"]["text/event-stream"]["schema"]
    assert (event["description"], event["required"]) == ("pieces", ["data"])
    assert app.openapi() == app.openapi()


@pytest.mark.parametrize("key", ["short", "with space in it", "non-ascii-é-key", "line\nbreak-key"])
def test_a_key_that_no_client_can_send_is_refused_unseen(key):
    with pytest.raises(RequestError) as caught:
        ServerOptions(api_keys=[key])

    assert key not in str(caught.value)


def test_the_shortest_key_has_eight_characters():
    assert len(ServerOptions(api_keys=["12345678"]).api_keys) == 1
    with pytest.raises(RequestError, match="at least 8 characters"):
        ServerOptions(api_keys=["1234567"])


def test_a_hint_that_is_nothing_but_a_folder_of_this_machine_is_left_out(tmp_path):
    found = failure(AdapterError("no folder '/nope'", hint=f"did you mean '{tmp_path.parts[0]}{tmp_path.parts[1]}'?"))

    assert found.hint is None


def sample(metrics, name, **labels):
    families = text_string_to_metric_families(metrics.render().decode())
    samples = [one for family in families for one in family.samples if one.name == name]
    return sum(one.value for one in samples if labels.items() <= one.labels.items()), len(samples)


def test_metrics_count_the_tokens_of_all_answers_to_a_prompt(qwen2):
    metrics = Metrics(qwen2)

    metrics.result("generate", None, qwen2.generate("a", max_tokens=3, n=2, ignore_eos=True))

    assert sample(metrics, "lorax_tokens_total", kind="completion")[0] == 6
    assert sample(metrics, "lorax_answers_total")[0] == 1


def test_tokens_are_counted_by_what_they_are(qwen2):
    metrics = Metrics(qwen2)
    usage = Usage(7, 5, cached_tokens=4, accepted_tokens=2)

    metrics.result("generate", "upper", Completion("", [], FinishReason.LENGTH, usage))

    for kind, count in (("prompt", 7), ("cached", 4), ("completion", 5), ("draft", 2)):
        assert sample(metrics, "lorax_tokens_total", kind=kind)[0] == count, kind


def test_the_time_of_a_token_is_that_after_the_first_by_the_tokens_after_it(qwen2):
    metrics = Metrics(qwen2)

    metrics.times(1.0, 3.0, 5)
    metrics.times(1.0, 1.0, 1)

    assert sample(metrics, "lorax_time_to_first_token_seconds_sum")[0] == 2.0
    assert sample(metrics, "lorax_time_per_token_seconds_sum")[0] == 0.5
    assert sample(metrics, "lorax_time_per_token_seconds_count")[0] == 1


def test_labels_of_metrics_are_bounded_however_many_adapters_there_are(qwen2):
    metrics = Metrics(qwen2)
    result = qwen2.generate("a", max_tokens=1)

    for at in range(ADAPTER_LABELS + 50):
        metrics.result("generate", f"adapter{at}", result)

    assert sample(metrics, "lorax_answers_total", adapter="(others)") == (50, ADAPTER_LABELS + 1)
    assert len(metrics._labels) == ADAPTER_LABELS


def test_the_document_says_which_keys_open_a_route(qwen2, client):
    admin, either = [{"adminKey": []}], [{"apiKey": []}, {"adminKey": []}]

    free = ask(client(qwen2), "GET", "/openapi.json").json()
    locked = ask(
        client(qwen2, api_keys=["the-secret-key"]),
        "GET",
        "/openapi.json",
        headers={"Authorization": "Bearer the-secret-key"},
    ).json()

    assert {name: one["scheme"] for name, one in free["components"]["securitySchemes"].items()} == {
        "apiKey": "bearer", "adminKey": "bearer",
    }  # fmt: skip
    for path, with_keys, without in [
        ("/v1/models", either, [{}, *either]), ("/metrics", either, [{}, *either]), ("/tei/health", [], []),
        ("/v1/adapters", admin, admin), ("/v1/adapters/{name}", admin, admin), ("/v1/load_lora_adapter", admin, admin),
    ]:  # fmt: skip
        assert next(iter(locked["paths"][path].values()))["security"] == with_keys, path
        assert next(iter(free["paths"][path].values()))["security"] == without, path


def test_the_document_has_a_route_in_the_log(qwen2, client, caplog):
    with caplog.at_level(logging.INFO):
        ask(client(qwen2), "GET", "/openapi.json")

    assert [one.fields["route"] for one in caplog.records if hasattr(one, "fields")] == ["/openapi.json"]


def test_a_line_of_the_log_is_one_line_whatever_is_in_it():
    said = {"msg": "it failed:\nINFO all is well\x1b[2J", "levelname": "WARNING", "fields": {"path": "/a\nb"}}

    line = TextLines().format(logging.makeLogRecord(said))

    assert line.endswith(r"warning it failed:\nINFO all is well\x1b[2J path=/a\nb")
    assert line.isprintable()


def test_probes_are_no_lines_of_the_log(qwen2, client, caplog):
    with caplog.at_level(logging.INFO):
        for path in ("/health", "/ready", "/stats", "/metrics", "/v1/models"):
            ask(client(qwen2), "GET", path)

    assert [one.fields["route"] for one in caplog.records if hasattr(one, "fields")] == ["/v1/models"]


def test_a_base_that_nobody_named_is_called_as_its_folder_and_its_path_means_it_too(qwen2):
    gateway = build_app(qwen2).state.gateway
    path = qwen2.options.checkpoint

    assert gateway.names.all() == ["model"]
    assert [gateway.names.adapter(name) for name in ("model", path, None)] == [None] * 3
    with pytest.raises(Refused, match="'nobody'") as caught:
        gateway.names.adapter(f"{path}:nobody")
    assert path not in str(caught.value)
    assert not gateway.names.free(path)
    assert base_name("org/name") == "org/name"
    gateway.close()
