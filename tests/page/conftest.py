"""One browser, and servers that it looks at (`make test-page` installs both)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import transformers as hf
from browser import Visit, chromium, lorax_serve
from builders import BERT, make_letter_tokenizer
from loopback import listening
from oracles import make_model, saved

import lorax_core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser

    from lorax_core.serving.engine import Engine

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium."""
    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """`lorax serve` with a small model that generates and five adapters, in a process of its own."""
    with lorax_serve() as address:
        yield address


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An encoder that labels tokens, and generates nothing."""
    folder = tmp_path_factory.mktemp("ner")
    make_letter_tokenizer().save_pretrained(folder)
    saved(make_model(hf.BertForTokenClassification, BERT, seed=7, num_labels=5, id2label=LABELS), folder)
    with lorax_core.load(folder) as engine:
        yield engine


@pytest.fixture(scope="session")
def entities(encoder: Engine) -> Iterator[str]:
    """Where the encoder is served."""
    with listening(encoder) as address:
        yield address


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens a page of a server. When a test ends, pages must have kept to their origin, without complaints."""
    made: list[Visit] = []

    def opened(url: str, **options: object) -> Visit:
        made.append(Visit(browser, url, **options))
        return made[-1]

    yield opened
    for one in made:
        one.close()
