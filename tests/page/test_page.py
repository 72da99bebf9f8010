"""The page of a server, used as people use it; what it shows is what the API answers."""

from __future__ import annotations

import json
import re
import socket

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import PANELS
from loopback import Loopback, listening
from playwright.sync_api import expect

KEY = "key-of-the-test"


def answer(url, path, **body):
    found = httpx.post(f"{url}{path}", json=body, timeout=30)
    assert found.status_code == 200, found.text
    return found.json()


def test_a_prompt_is_answered_by_two_side_by_side(url, visit):
    page = (seen := visit(url).known()).page
    page.get_by_label("Text to continue").check()
    page.fill("#prompt", "When a file is opened")
    page.select_option("#left", label="base: tiny-qwen2")
    page.select_option("#right", "upper")
    page.fill("#max-tokens", "24")

    seen.submit("generate", "2 answers in")

    for side, model in [("left", "tiny-qwen2"), ("right", "upper")]:
        body = {"model": model, "prompt": "When a file is opened", "max_tokens": 24, "temperature": 0}
        expected = answer(url, "/v1/completions", **body)["choices"][0]["text"]
        assert page.locator(f"#text-{side}").text_content() == "When a file is opened" + expected
        assert page.locator(f"#name-{side}").text_content() == model
        expect(page.locator(f"#note-{side}")).to_contain_text("24 tokens in")


def test_an_answer_is_drawn_as_the_temperature_and_the_seed_say(url, visit):
    page = (seen := visit(url).known()).page
    page.get_by_label("Text to continue").check()
    page.select_option("#right", "-")
    for name, value in (("max-tokens", "16"), ("temperature", "1.5"), ("seed", "7")):
        page.fill(f"#{name}", value)

    seen.submit("generate", "1 answer in")

    prompt = page.input_value("#prompt")
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 1.5, "seed": 7}
    [choice] = answer(url, "/v1/completions", **body)["choices"]
    assert page.locator("#text-left").text_content() == prompt + choice["text"]


def test_a_chat_message_is_answered_by_one(url, visit):
    page = (seen := visit(url).known()).page
    page.get_by_label("Chat message").check()
    page.select_option("#right", "-")
    page.fill("#max-tokens", "8")

    seen.submit("generate", "1 answer in")

    messages = [{"role": "user", "content": page.input_value("#prompt")}]
    [choice] = answer(url, "/v1/chat/completions", messages=messages, max_tokens=8, temperature=0)["choices"]
    assert page.locator("#text-left").text_content() == choice["message"]["content"].lstrip()
    expect(page.locator("#card-right")).to_be_hidden()


def test_text_comes_while_it_is_computed_and_can_be_stopped(url, visit):
    page = visit(url).known().page
    page.get_by_label("Chat message").check()
    page.fill("#max-tokens", "480")

    page.click("#form-generate [type=submit]")
    for side in ("left", "right"):
        expect(page.locator(f"#text-{side}")).not_to_be_empty()
    page.click("#stop")

    expect(page.locator("#note-generate")).to_contain_text("Stopped in")
    expect(page.locator("#note-left")).to_have_text("stopped")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#form-generate [type=submit]")).to_be_focused()
    expect(page.locator("#live-running")).to_have_text("0")


def test_similarities_are_those_of_the_vectors(url, visit):
    page = (seen := visit(url).known()).page
    seen.choose("embed")
    texts = ["Open a file.", "The file is open.", "Add two numbers."]
    page.fill("#texts", "\n".join(texts))
    page.select_option("#by-embed", "similar")

    seen.submit("embed", "3 vectors of 128 numbers")

    vectors = np.array(
        [one["embedding"] for one in answer(url, "/v1/embeddings", model="similar", input=texts)["data"]]
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shown = np.array(page.locator("#out-embed td").all_text_contents(), float).reshape(3, 3)
    assert np.abs(shown - unit @ unit.T).max() < 0.006
    assert page.locator("#out-embed tbody th").all_text_contents() == [
        f"{at + 1}. {one}" for at, one in enumerate(texts)
    ]


def test_labels_are_shown_with_their_scores(url, visit):
    page = (seen := visit(url).known()).page
    seen.choose("classify")
    assert page.locator("#by-classify option").all_text_contents() == ["relevant", "topic"]
    page.fill("#lines", "Return True if the path is a file.\nRaise an error.")
    page.select_option("#by-classify", "topic")

    seen.submit("classify", "2 texts in")

    found = answer(url, "/tei/predict", model="topic", inputs=[["Return True if the path is a file."]])[0]
    first = page.locator("#out-classify .card").first
    assert first.locator("li p").all_text_contents() == [f"{one['label']} {one['score']:.3f}" for one in found]


def test_documents_are_shown_the_best_first(url, visit):
    page = (seen := visit(url).known()).page
    seen.choose("rerank")
    documents = ["Add two numbers.", "Open the file with open().", "Raise an error."]
    page.fill("#documents", "\n".join(documents))

    seen.submit("rerank", "3 documents in")

    found = answer(url, "/v1/rerank", model="relevant", query=page.input_value("#query"), documents=documents)[
        "results"
    ]
    shown = page.locator("#out-rerank li p span:first-child").all_text_contents()
    assert shown == [f"{at + 1}. {documents[one['index']]}" for at, one in enumerate(found)]


def test_the_server_is_shown_live(url, visit):
    page = (seen := visit(url).known()).page
    seen.submit("generate", "answers in")
    seen.choose("live")

    rows = page.locator("#live-adapters tr")
    expect(rows).to_have_count(5)
    assert rows.first.locator("th, td").all_text_contents() == [
        "bullets",
        "lora",
        "generate, embed",
        "0.4 MB",
        "device",
    ]
    expect(page.locator("#live-pages")).to_contain_text("of 256 pages")
    expect(page.locator("#live-peak")).to_have_text(re.compile(r"at most [1-9]"))


def test_entities_are_marked_and_text_is_never_markup(entities, visit):
    page = (seen := visit(entities).known()).page
    seen.choose("classify")
    text = "😀 the cat <img src=x onerror=alert(1)> sat <b>here</b>"
    page.fill("#lines", text)

    seen.submit("classify", "in 1 text")

    found = answer(entities, "/classify", inputs=text)
    assert found, "the model of this test finds something"
    marks = page.locator("#out-classify mark").all_text_contents()
    assert marks == [f"{text[one['start'] : one['end']]} {one['entity_group']} {one['score']:.2f}" for one in found]
    assert page.locator("#out-classify").locator("img, b").count() == 0
    colours = {mark.evaluate("one => getComputedStyle(one).backgroundColor") for mark in page.locator("mark").all()}
    assert len(colours) == len({one["entity_group"] for one in found})


def test_what_a_base_cannot_do_is_disabled_with_the_reason(entities, visit):
    page = (seen := visit(entities).known()).page

    expect(page.locator("#tab-embed")).to_have_attribute("aria-selected", "true")
    seen.choose("generate")
    expect(page.locator("#prompt")).to_be_disabled()
    expect(page.locator("#note-generate")).to_have_text("base is a bert model, which does not generate text.")
    seen.choose("rerank")
    expect(page.locator("#note-rerank")).to_contain_text("Nothing that is loaded ranks")


def test_an_error_is_shown_where_it_happens_with_its_hint(url, visit):
    page = visit(url).known().page
    page.get_by_label("Text to continue").check()
    page.fill("#max-tokens", "5000")

    page.click("#form-generate [type=submit]")

    body = {"prompt": page.input_value("#prompt"), "max_tokens": 5_000, "temperature": 0}
    error = httpx.post(f"{url}/v1/completions", json=body).json()["error"]
    for side in ("left", "right"):
        expect(page.locator(f"#error-{side}")).to_have_text(f"{error['message']} ({error['hint']})")


def test_a_stream_that_breaks_off_is_no_whole_answer(url, visit):
    page = visit(url).known().page
    page.get_by_label("Text to continue").check()
    events = [{"choices": [{"text": " and read"}]}, {"error": {"message": "it broke", "hint": "ask again"}}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))

    page.click("#form-generate [type=submit]")

    expect(page.locator("#error-left")).to_have_text("it broke (ask again)")
    expect(page.locator("#text-left")).to_contain_text(" and read")
    expect(page.locator("#note-left")).to_be_empty()


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b""], ids=["ended", "cut"])
def test_a_server_that_ends_within_its_answer_is_said(url, visit, end):
    page = visit(url).known().page
    page.get_by_label("Text to continue").check()
    page.select_option("#right", "-")
    event = b'data: {"choices": [{"text": " and read"}]}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as dying:
        where = f"http://127.0.0.1:{dying.getsockname()[1]}/"
        page.route("**/v1/completions", lambda route: route.continue_(url=where))

        page.click("#form-generate [type=submit]")
        with dying.accept()[0] as asked:
            asked.recv(65_536)
            asked.sendall(head + b"%x\r\n%s\r\n" % (len(event), event) + end)

        expect(page.locator("#error-left")).to_have_text("The answer broke off. Is the server still running?")


def test_more_texts_than_a_picture_shows_are_refused(url, visit):
    page = (seen := visit(url).known()).page
    seen.choose("embed")
    page.fill("#texts", "a line\n" * 25)

    page.click("#form-embed [type=submit]")

    expect(page.locator("#error-embed")).to_have_text("25 texts are too many for a picture; give 24 or fewer")
    expect(page.locator("#note-embed")).to_be_empty()


def test_a_key_is_asked_for_and_kept_in_memory_alone(encoder, visit):
    with listening(encoder, api_keys=[KEY]) as address:
        page = visit(address).page
        dialog, given = page.get_by_role("dialog", name="API key"), page.get_by_label("Key", exact=True)

        expect(dialog).to_be_visible()
        given.fill("another-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key-why")).to_contain_text("does not accept the key")
        given.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#about")).to_contain_text("adapter")

        expect(dialog).to_be_hidden()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.reload()
        expect(dialog).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#about")).to_contain_text("key")


def test_a_server_that_is_gone_is_said(encoder, visit):
    with Loopback(encoder) as server:
        page = visit(server.url).known().page
        server.close()

        expect(page.locator("#about")).to_contain_text("does not answer")


def test_all_is_done_by_keyboard_with_the_focus_in_sight(url, visit):
    page = visit(url).known().page
    press = page.keyboard.press
    focused = page.locator(":focus")

    press("Tab")  # the key
    press("Tab")
    expect(focused).to_have_id("tab-generate")
    press("ArrowRight")
    expect(focused).to_have_id("tab-embed")
    assert (
        focused.evaluate("one => getComputedStyle(one).outlineStyle + getComputedStyle(one).outlineWidth") == "solid3px"
    )
    press("Tab")
    expect(focused).to_have_id("texts")
    press("Control+a")
    page.keyboard.type("One file.\nTwo numbers.")
    press("Tab")
    expect(focused).to_have_id("by-embed")
    press("Tab")
    press("Enter")
    expect(page.locator("#note-embed")).to_contain_text("2 vectors of")
    press("Tab")
    expect(focused).to_have_attribute("aria-label", "Similarities")
    page.locator("#tab-embed").focus()
    press("End")
    expect(page.locator("#panel-live")).to_be_visible()
    press("ArrowRight")
    expect(page.locator("#panel-generate")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1280, "dark"), (1280, "light"), (320, "dark")])
def test_every_panel_is_readable_at_any_width_and_in_both_schemes(url, visit, width, scheme):
    page = (seen := visit(url, width=width, color_scheme=scheme, reduced_motion="reduce").known()).page
    seen.use_all()

    for panel in PANELS:
        seen.choose(panel)
        assert page.evaluate("document.documentElement.scrollWidth") == width, panel
        found = Axe().run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], panel
    assert page.evaluate("document.getAnimations().length") == 0
    dark = "matchMedia('(prefers-color-scheme: dark)').matches"
    assert page.evaluate(dark) is (scheme == "dark")


def test_entities_and_the_key_are_readable_in_both_schemes(entities, visit):
    for scheme in ("light", "dark"):
        page = (seen := visit(entities, color_scheme=scheme).known()).page
        seen.choose("classify")
        seen.submit("classify", "in 2 texts")
        assert Axe().run(page).response["violations"] == []
        page.click("#key-open")
        assert Axe().run(page).response["violations"] == []
