"""Tools: shown by the template or refused, calls that follow their schemas, and which text is a call."""

from __future__ import annotations

import json

import pytest
from builders import make_byte_tokenizer, make_qwen2
from chats import CLOCK, TOOL_TEMPLATE, WEATHER
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import lorax_core as lorax
from lorax_core.errors import CapacityError, RequestError
from lorax_core.serving.structured import GrammarFactory
from lorax_core.serving.text import TextFront
from lorax_core.serving.tools import CallReader, ToolCall
from lorax_core.types import Task

CHAT = [{"role": "user", "content": "hello"}]
END = frozenset({256})
CALL = '<tool_call>\n{"name": "clock", "arguments": {"a": "</tool_call>"}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = make_qwen2(tmp_path_factory.mktemp("tools"), max_position_embeddings=2048)
    make_byte_tokenizer(TOOL_TEMPLATE).save_pretrained(folder)
    with lorax.load(folder, kv_cache_tokens=16_384) as engine:
        yield engine


def read(text, sizes=None, names=("clock", "get_weather")):
    """Text and calls of a reader that gets pieces of these sizes."""
    reader, found = CallReader(names), []
    while text:
        size = sizes.pop() if sizes else len(text)
        piece, text = text[:size], text[size:]
        found += reader.push(piece)
    found += reader.finish()
    shown = "".join(one for one in found if isinstance(one, str))
    return shown, [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, ToolCall)]


def written(messages, tools=None, template=TOOL_TEMPLATE, **options):
    tokenizer = make_byte_tokenizer(template)
    ids = TextFront(tokenizer).encode(messages, Task.GENERATE, tools=tools, template_options=options).ids
    return tokenizer.decode(ids)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
def test_tools_and_options_reach_the_template_as_transformers_gives_them(options):
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {"a": ["ü", 1]}}}]
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "12"}]

    oracle = make_byte_tokenizer(TOOL_TEMPLATE).apply_chat_template(
        messages, tools=[WEATHER, CLOCK], tokenize=False, **{"add_generation_prompt": True, **options}
    )

    assert written(messages, [WEATHER, CLOCK], **options) == oracle


@pytest.mark.parametrize("content", ["I say ", " so\n"])
def test_the_last_message_is_continued_as_transformers_does(content):
    messages = [*CHAT, {"role": "assistant", "content": content}]
    oracle = make_byte_tokenizer(TOOL_TEMPLATE).apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )

    assert written(messages, continue_final_message=True) == oracle


def test_a_template_that_wants_the_text_of_arguments_gets_it():
    template = "{% for c in messages[0].tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]

    assert written([{"role": "assistant", "tool_calls": calls}], template=template) == 'f{"a": 1}'


def test_a_template_that_shows_no_tools_is_a_refusal():
    with pytest.raises(RequestError, match="shows no tools"):
        written(CHAT, [CLOCK], template="{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tools": []}, "1 to 128 tools"),
        ({"tools": [{"name": "f"}]}, "a tool is"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name of a tool"),
        ({"tools": [{"type": "function", "function": {"name": "required"}}]}, "name of a tool"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "object"),
        ({"tools": [CLOCK, CLOCK]}, "same name"),
        ({"tools": [CLOCK], "tool_choice": "clok"}, "one of the tools, 'clock'"),
        ({"tool_choice": "required"}, "one of the tools"),
        ({"tools": [CLOCK], "regex": "a"}, "no room for calls"),
        ({"template_options": {"tools": []}}, "option of its own"),
        ({"template_options": {"x": object()}}, "text, numbers"),
        ({"template_options": {"add_generation_prompt": True, "continue_final_message": True}}, "exclude each other"),
        ({"prompt": "text", "tools": [CLOCK]}, "chat messages"),
        ({"prompt": [1, 2], "template_options": {"a": 1}}, "chat messages"),
    ],
)
def test_what_describes_no_tools_is_refused(options, said):
    with pytest.raises(RequestError, match=said):
        lorax.GenerateRequest(**{"prompt": CHAT, **options})


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"clock", "get_weather"}), ("get_weather", {"get_weather"})]
)
def test_calls_that_must_come_follow_their_schemas_however_random_the_model(engine, choice, names):
    seen = set()
    for seed in range(6):
        completion = engine.generate(
            CHAT, tools=[WEATHER, CLOCK], tool_choice=choice, parallel_tool_calls=False, max_tokens=400,
            temperature=20.0, seed=seed,
        )  # fmt: skip

        text, calls = read(completion.text)
        assert text == ""
        ((name, arguments),) = calls
        seen.add(name)
        assert completion.finish_reason == "stop"
        assert name == "clock" or (set(arguments) == {"place", "days"} and 1 <= arguments["days"] <= 9)
    assert seen == names


def test_blanks_in_calls_are_bounded(engine):
    completion = engine.generate(
        CHAT, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=400,
        logit_bias=dict.fromkeys(map(ord, " \n\t"), 50.0),
    )  # fmt: skip

    _, ((name, arguments),) = read(completion.text)
    assert (name, set(arguments)) == ("get_weather", {"place", "days"})


def test_an_answer_with_a_schema_or_calls_may_come(engine):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    kinds = set()
    for seed in range(12):
        text = engine.generate(
            CHAT, tools=[CLOCK], json_schema=schema, max_tokens=300, temperature=20.0, seed=seed,
            parallel_tool_calls=False,
        ).text  # fmt: skip
        shown, calls = read(text)
        kinds.add("call" if calls else "answer")
        assert calls == [("clock", {})] or isinstance(json.loads(shown)["x"], bool)

    assert kinds == {"call", "answer"}


def test_calls_of_strict_tools_follow_their_schema_within_free_text(engine):
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    messages = [*CHAT, {"role": "assistant", "content": "I look.\n<tool_call"}]
    options = {"tools": [strict], "template_options": {"continue_final_message": True}}

    preparer = engine._preparer
    grammar = preparer.grammars.grammar(
        lorax.GenerateRequest(prompt=messages, **options), preparer.text.tokenizer, preparer.eos_ids
    )
    for token in b"anything <tool_call>":
        assert grammar.allowed()[token // 8] >> token % 8 & 1
        grammar.advance(token)
    free = sum(byte.bit_count() for byte in grammar.allowed())

    assert free == 1  # the line break that a call begins with


def test_schemas_of_all_tools_are_bounded_together(engine):
    parts = [{"properties": {"a": {"type": "string", "pattern": "b+"}}}] * 3
    tools = [
        {"type": "function", "function": {"name": f"f{at}", "parameters": {"type": "object", "allOf": parts}}}
        for at in range(3)
    ]

    engine.generate(CHAT, tools=tools[:2], tool_choice="required", max_tokens=1)
    engine.generate(CHAT, tools=tools, max_tokens=1)  # none is enforced
    with pytest.raises(RequestError, match="the schema of all tools joins 9 parts"):
        engine.generate(CHAT, tools=tools, tool_choice="required", max_tokens=1)


STRICT = {"type": "function", "function": {**CLOCK["function"], "strict": True}}


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"tools": [CLOCK], "tool_choice": "required"},
         ["<tool_call>", '\n{"name": "clock", "arguments": {}}\n', "</tool_call>"]),
        ({"tools": [CLOCK], "json_schema": {"type": "object"}}, ["<tool_call>", '\n{"name"']),
        ({"tools": [CLOCK], "json_schema": {"type": "object"}}, ['{"a":1}']),
        ({"tools": [STRICT]}, ["<think>", "so", "</think>", "I call", "<tool_call>", '\n{"name": "clock", "arguments": {}}\n',
                               "</tool_call>", " and", "<think>", "."]),
        ({"tools": [STRICT]}, ["no call"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("marks", [("<tool_call>", "</tool_call>", "<think>", "</think>"), ("<think>", "</think>"), ()])
def test_marks_that_are_tokens_are_written_as_such(options, written, marks):
    tokenizer = make_byte_tokenizer(TOOL_TEMPLATE)
    tokenizer.add_tokens([AddedToken(mark, special=False) for mark in marks])
    factory = GrammarFactory(len(tokenizer))
    request = lorax.GenerateRequest(prompt=CHAT, **options)

    grammar = factory.grammar(request, tokenizer, END)

    for text in written:
        for token in [tokenizer.convert_tokens_to_ids(text)] if text in marks else text.encode():
            assert grammar.allowed()[token // 8] >> token % 8 & 1, (text, token)
            grammar.advance(token)
    if "tool_choice" not in options or options["tool_choice"] != "required":
        return
    with pytest.raises(CapacityError):
        factory.grammar(request, tokenizer, END).advance(ord("x"))


def test_text_is_split_into_text_and_calls():
    assert read(f"a {CALL}\n{CALL} \n") == ("a", [("clock", {"a": "</tool_call>"})] * 2)
    assert read("a \n") == ("a \n", [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call> is how calls begin",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": []}</tool_call> and',
        '<tool_call>{"name": ["clock"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "clock", "argum',
        '<tool_call>{"name": clock}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {"a": "</tool_call>',
        "<tool_call>" + '{"a":' * 100_000 + "</tool_call>",
        "<tool_cal",
    ],
)
def test_what_is_no_call_stays_text(text):
    assert read(text) == (text, [])


def test_arguments_are_text_whatever_a_model_escapes():
    (call,) = CallReader(["clock"]).push('<tool_call>{"name": "clock", "arguments": {"a": "\\ud800é"}}</tool_call>')

    assert json.loads(call.arguments.encode()) == {"a": "\ud800é"}


def test_a_call_that_a_stop_string_cut_off_is_a_call():
    assert read(CALL.removesuffix("</tool_call>")) == ("", [("clock", {"a": "</tool_call>"})])


@given(st.lists(st.sampled_from([CALL, "<tool_call>", "</tool_call>", "a", " \n", "{", '"', "<tool"])), st.randoms())
def test_pieces_of_any_size_are_read_as_the_whole_is(parts, random):
    text = "".join(parts)
    sizes = [random.randint(1, 12) for _ in text]

    assert read(text, sizes) == read(text)


def test_text_is_shown_as_soon_as_it_cannot_be_a_call():
    reader = CallReader(["clock"])

    assert reader.push("one <tool_") == ["one"]
    assert reader.push("box") == [" <tool_box"]


def test_tokens_are_bytes_of_the_text(engine):
    text = "the é \n漢\U0001f600"
    ids = engine.tokenize(text).ids

    assert b"".join(engine.token_bytes(ids)) == text.encode()
    assert engine.token_bytes([256]) == [b"<|end|>"]
    assert engine.token_bytes([256], special=False) == [b""]
