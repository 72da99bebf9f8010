"""Chat templates: the text is that of transformers, and a template that does too much ends by itself."""

from __future__ import annotations

import resource

import pytest
from builders import make_byte_tokenizer
from rigs import within

from lorax_core.errors import RequestError
from lorax_core.serving import allowance
from lorax_core.serving.allowance import TooMuch
from lorax_core.serving.templates import ChatTemplate
from lorax_core.serving.text import TextFront
from lorax_core.types import Task

LIMIT = 120  # seconds: for a rendering that never ends

# Written as those of the families are: what they use of jinja, in their ways.
TEMPLATES = {
    "chatml": """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content|string + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "headers": """{{ bos_token }}{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start|>' ~ message['role'] ~ '<|end|>\n\n' ~ message['content'] | trim ~ eos_token %}
{% if loop.index0 == 0 %}{% set content = 'first ' + content %}{% endif %}{{ content }}
{%- endfor -%}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}""",
    "instructions": """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- set ns = namespace(index=0, last=none) %}
{%- for message in rest if message.role in ["user", "assistant"] -%}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}{%- set ns.last = loop.index %}{%- endif %}
{%- endfor %}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {{- " [INST] " + (system + "\\n\\n" if system is defined and loop.first else "") + message.content + " [/INST]" }}
    {%- else %}{{- " " + message.content|trim + eos_token -}}{% endif %}
{%- endfor %}{{ ns.last }}{{ "%d-%s" % (ns.index, "x" * 3) }}""",
    "turns": """{%- macro shown(content, deep=false) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- elif content is mapping -%}
        { {%- for key, value in content | dictsort %}
            {{- key }}:{{ shown(value, deep=true) }}{{ "," if not loop.last }}
        {%- endfor -%} }
    {%- elif content is sequence -%}
        {%- for item in content -%}[{{ shown(item) }}]{%- endfor -%}
    {%- else -%}{{ content }}{%- endif -%}
{%- endmacro -%}
{% for message in messages %}
{% generation %}<turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ shown(message.content) }}{% endgeneration %}
{% for call in message.tool_calls or [] %}
<call>{{ call | tojson(indent=2) }}{% for name, value in call.arguments | items %}{{ name ~ '=' ~ value }}{% endfor %}</call>
{% endfor %}
{% set parts = message.content.split(' ') if message.content is string else [] %}
{{ parts | length }}{{ parts[::-1] | join('/') }}{{ ', '.join(parts[:2]) }}{{ parts | map('upper') | list }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content.strip('\\n').replace('a', 'b') }}</think>{% endif %}
{% if not message.weight is defined %}{% continue %}{% endif %}{{ '{:>8}|{}'.format(message.weight, 'x') }}
{% endfor %}{% set kept = messages | selectattr('role', 'equalto', 'user') | list %}{{ kept | length }}
{{ dict(a=1, b=[none, true])|tojson }}{{ [1, 2.5, 'é'] + [3] }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ loop is defined }}""",
}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "hello"}],
    "system": [
        {"role": "system", "content": "be brief\n"},
        {"role": "user", "content": " hi a b ", "name": None},
        {"role": "assistant", "content": "yes", "reasoning": "\na thought\n"},
        {"role": "user", "content": "é 漢字 <|im_end|>"},
    ],
    "parts": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "image"}],
            "weight": 2.5,
            "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": [None, {"z": "ü"}]}}],
        }
    ],
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_written_as_transformers_writes_it(template, conversation):
    messages = CONVERSATIONS[conversation]
    tokenizer = make_byte_tokenizer(TEMPLATES[template])
    refused = None
    try:
        oracle = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except Exception as error:  # a template that has no use for parts, say
        refused = str(error)

    if refused is None:
        assert ChatTemplate(TEMPLATES[template]).render(messages, tokenizer.special_tokens_map) == oracle
        assert TextFront(tokenizer).encode(messages, Task.GENERATE).ids == ids
    else:
        with pytest.raises(RequestError) as caught:
            TextFront(tokenizer).encode(messages, Task.GENERATE)
        assert refused in caught.value.message


def test_most_of_these_conversations_can_be_written():
    written = []
    for name, template in TEMPLATES.items():
        for messages in CONVERSATIONS.values():
            tokenizer = make_byte_tokenizer(template)
            try:
                written.append((name, len(tokenizer.apply_chat_template(messages, tokenize=False))))
            except TypeError:
                continue

    assert len(written) >= 9
    assert {name for name, _ in written} == set(TEMPLATES)


GROWING = "{% set ns = namespace(x=START) %}{% for i in range(200) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
TOO_MUCH = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a loop that keeps nothing": "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "printing in a loop": "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{{ x }}{% endfor %}",
    "a block": "{% set x = 'a' * 1000000 %}{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
    "plain text in a loop": "{% for i in range(100000) %}" + "text " * 1000 + "{% endfor %}",
    "doubling by ~": GROWING.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
    "doubling by +": GROWING.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
    "doubling a list": GROWING.replace("START", "[1]").replace("STEP", "ns.x + ns.x"),
    "lists in lists": GROWING.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]"),
    "pairs in pairs": GROWING.replace("START", "(1,)").replace("STEP", "(ns.x, ns.x)"),
    "mappings in mappings": GROWING.replace("START", "{}").replace("STEP", "{'a': ns.x, 'b': ns.x}|tojson"),
    "squares": GROWING.replace("START", "3").replace("STEP", "ns.x * ns.x"),
    "slices": "{% set x = 'a' * 3999999 %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(100000) %}{% set ns.x = ns.x + [x[1:]] %}{% endfor %}",
    "a product": "{{ 'a' * 1000000000 }}",
    "a product of a tuple": "{{ (1, 2) * 1000000000 }}",
    "a product of a list": "{{ 1000000000 * [1] }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a width": "{{ 'a'.ljust(1000000000) }}",
    "a width of a filter": "{{ 'a'|center(1000000000) }}",
    "a width in a filter's filter": "{{ ['a']|map('center', 1000000000)|list }}",
    "a width in a format": "{{ '%1000000000d' % 1 }}",
    "a width beside a format": "{{ '%*d'|format(1000000000, 1) }}",
    "a width in a field": "{{ '{:1000000000}'.format(1) }}",
    "a width beside a field": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "a format of many places": "{% set x = 'a' * 1000000 %}{{ ('%(x)s' * 100000) % {'x': x} }}",
    "many fields": "{% set x = 'a' * 1000000 %}{{ ('{0}' * 100000).format(x) }}",
    "a mapping of fields": "{% set x = 'a' * 1000000 %}{{ ('{x}' * 100000).format_map({'x': x}) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "an indent": "{{ ('a\\n' * 10000)|indent(100000) }}",
    "an indent by a text": "{{ ('a\\n' * 10000)|indent('a' * 100000) }}",
    "JSON": "{{ messages|tojson(indent=1000000000) }}",
    "a batch": "{{ [1]|batch(1000000000, 1)|list }}",
    "slicing": "{{ [1]|slice(1000000000)|list }}",
    "rounding": "{{ 1.5|round(1000000000, 'ceil') }}",
    "replacing": "{% set x = 'a' * 1000000 %}{{ x.replace('a', x) }}",
    "a replacing filter": "{% set x = 'a' * 1000000 %}{{ x|replace('a', x) }}",
    "joining": "{{ ('a' * 1000000).join('b' * 1000000) }}",
    "a joining filter": "{{ range(100000)|join('a' * 1000000) }}",
    "splitting": "{% set x = 'a ' * 4000000 %}{{ x.split(' ')|length }}",
    "a test of each element": "{% set x = range(100000)|list %}{{ x|select('in', x)|list|length }}",
    "a test that rejects": "{% set x = range(100000)|list %}{{ x|reject('in', x)|list|length }}",
    "a date": "{{ strftime_now('%c' * 1000) }}",
    "a long template": "a" * 600_000,
}
TOO_SLOW = {
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a slow comparison": "{% set x = range(100000)|list %}{% set y = range(100000)|list %}"
    "{% for i in range(100000) %}{% if x == y %}{% endif %}{% endfor %}",
    "filters of long lists": "{% set x = range(100000)|list %}{% for i in range(99) %}{{ x|sort|length }}{% endfor %}",
}
"""What takes long before it takes many steps."""


def rendered(template, seconds=allowance.SECONDS):
    return ChatTemplate(template, seconds).render(CONVERSATIONS["one"], {})


@pytest.mark.parametrize("case", [*TOO_MUCH, *TOO_SLOW])
def test_a_template_that_does_too_much_ends_by_itself_in_little_memory(case):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template, seconds = (TOO_MUCH[case], allowance.SECONDS) if case in TOO_MUCH else (TOO_SLOW[case], 1)

    with pytest.raises(TooMuch):
        within(LIMIT, lambda: rendered(template, seconds))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024  # KiB


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "9" * 10_000 + " }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[9].role.name }}",
        "{{ 1 / 0 }}",
        "{{ {}.get() }}",
        "{{ raise_exception(5) }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% include 'x' %}",
        "{% for %}",
        "{{ 'a'|nothing }}",
        "{{ lipsum(1) }}",
        # Work that their arguments do not show, and that no chat template needs.
        "{{ 1|filesizeformat }}",
        "{{ messages|pprint }}",
        "{{ 'a'|striptags }}",
        "{{ 'a'|urlize }}",
        "{{ 'a'|wordwrap(1) }}",
        "{{ {'a': 1}|xmlattr }}",
        "{{ 'a'.encode() }}",
        "{{ ('a' * 30000).translate({97: 'b' * 100000}) }}",
        "{{ ('a'|attr('encode'))() }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ '\\ud800' }}",
        "{{ 10 ** 5000 }}",
        "{{ 'a' ~ messages[0] * 2 }}",
    ],
)
def test_whatever_a_template_raises_is_an_error_of_the_request(template):
    with pytest.raises(RequestError, match="the chat template refused") as caught:
        within(LIMIT, lambda: TextFront(make_byte_tokenizer(template)).encode(CONVERSATIONS["one"], Task.GENERATE))

    assert caught.value.hint


def test_the_seconds_that_were_exceeded_are_told():
    with pytest.raises(TooMuch, match=r"it takes more than 0\.1 seconds"):
        within(LIMIT, lambda: rendered(TOO_SLOW["a slow comparison"], 0.1))


def test_a_namespace_that_holds_itself_is_printed_without_what_it_holds():
    assert rendered("{% set ns = namespace(a=1) %}{% set ns.b = ns %}{{ ns }}") == "<Namespace>"


def test_each_rendering_has_the_whole_allowance():
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}{{ 'a' * 3999999 }}")

    lengths = [len(template.render([], {})) for _ in range(30)]

    assert lengths == [3_999_999] * 30
    assert allowance.CHARACTERS < 30 * 3_999_999
    assert allowance.STEPS < 30 * 90_000


def test_what_a_long_conversation_takes_is_far_from_the_allowance():
    messages = [{"role": role, "content": "text " * 200} for role in ("user", "assistant")] * 500

    text = ChatTemplate(TEMPLATES["turns"]).render(messages, {"bos_token": "b", "eos_token": "e"})

    assert text == make_byte_tokenizer(TEMPLATES["turns"]).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
