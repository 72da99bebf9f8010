"""schemathesis over `/openapi.json`: no 500, and no answer that the document does not allow."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error, status_code_conformance
from schemathesis.checks import response_headers_conformance as headers_conformance
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
)

import lorax_core
from lorax_core.server.app import build_app
from lorax_core.server.options import ServerOptions

KEY = "the-admin-key"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    headers_conformance,
    unsupported_method,
]
bounded = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def described(engine):
    """The document of a server, whose requests go to it."""
    # A sampled request may ask for thousands of tokens: seconds, and on a machine that does other things more.
    app = build_app(engine, ServerOptions(admin_key=KEY, request_timeout=60), model_name="base")
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.fixture(scope="module")
def generating(repository):
    folder = repository / "examples/tiny_qwen2"
    adapters = {name: str(folder / "adapters" / name) for name in ("topic", "upper")}
    with lorax_core.load(
        folder / "model", adapters=adapters, adapter_sources=[], kv_cache_tokens=4_096, max_batch_rows=16
    ) as engine:
        yield described(engine)


@pytest.fixture(scope="module")
def labelling(bert_labels):
    with lorax_core.load(bert_labels) as engine:
        yield described(engine)


@pytest.fixture(scope="module")
def bert_labels(tmp_path_factory):
    from builders import BERT, make_letter_tokenizer, randomise
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("bert_labels")
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=1)).eval()
    randomise(model)
    model.save_pretrained(folder)
    make_letter_tokenizer().save_pretrained(folder)
    return folder


def broken(schema):
    """What was found of each operation of a document."""
    found = {}
    for operation in (one.ok() for one in schema.get_all_operations()):

        @bounded
        @given(case=operation.as_strategy())
        def attempt(case):
            case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {KEY}"})

        try:
            attempt()
        except (Exception, BaseExceptionGroup) as error:  # all operations are tried, whatever one of them does
            found[operation.label] = "\n".join(map(str, getattr(error, "exceptions", [error])))
    return found


def test_a_model_that_generates_answers_as_its_document_says(generating):
    assert broken(generating) == {}


def test_a_model_that_labels_answers_as_its_document_says(labelling):
    assert broken(labelling) == {}
