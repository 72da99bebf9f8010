"""Chat templates, which are programs."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from builders import CHAT_TEMPLATE

from fuzz.house import House
from fuzz.judge import Answer, Attempt
from fuzz.mutations import damage_text, odd_value

HOSTILE = [
    "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 9**9**9 }}", "{{ ('x' * 10**6) * 10**6 }}", "{{ 'a'.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}", "{{ self.__init__ }}", "{{ undefined.attribute }}", "{{ 1/0 }}",
        "{% include 'x' %}", "{% import 'x' as y %}",
    "{{ messages[10**9] }}", "{{ messages|map(attribute='x')|list }}", "{{ raise_exception('no') }}",
        "{{ raise_exception(5) }}", "{{ strftime_now('%Y') }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace(x=1) %}{% for i in range(3) %}{% set ns.x = ns.x * 10 %}{% endfor %}{{ ns.x }}",
    "{% break %}", "{% generation %}x{% endgeneration %}", "{{ messages|tojson }}",
        "{{ messages[0]['content'][0]['text'] }}", "{{ '\ud800' }}", "", " ", "{%", "{{", "{# ", "plain",
    "{{ '%1000000000d' % 5 }}", "{{ '{:>1000000000}'.format('x') }}", "{{ 'x'.center(10**9) }}",
        "{{ [0]*10**9 }}", "{{ range(10**12)|list }}", "{{ (range(10**8)|list)|length }}",
    "{{ lipsum(n=10**6) }}", "{{ dict(a=1).update(b=2) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ messages.append(1) }}",
        "{{ 'a' ~ none.x }}",
    "{{ 'abc'|replace('', 'x'*10**5)|replace('x', 'y'*10**5) }}",
        "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}", "{{ messages|groupby('role') }}", "{{ 10**100000 }}",
]  # fmt: skip
PARTS = ["{% for message in messages %}", "{% endfor %}", "{{ message['role'] }}", "{{ message.content|trim }}",
    "{% if loop.first %}", "{% else %}", "{% endif %}", "{{ message.content|upper }}", "x ",
    "{{ add_generation_prompt }}", "{{- '\\n' -}}", "{% set x = 1 %}", "{{ x }}", "{{ messages|length }}"]  # fmt: skip
CHATS: list[Any] = [
    [{"role": "user", "content": "hi"}], [{"role": "system", "content": "s"}, {"role": "user",
        "content": "hello there"}], [{"role": "nobody", "content": "x"}],
    [{"role": "user"}], [{}], [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text",
        "text": "hi"}]}], [{"role": 5, "content": 5}],
    [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "a\0b" * 20}], [{"content": "hi",
        "role": "user", "tool_calls": [{"x": float("nan")}]}],
]  # fmt: skip


def template(house: House, random: Random) -> Attempt:
    """A chat template, in its own file or within `tokenizer_config.json`, and messages for it."""
    folder = house.copy("qwen2")
    how = random.choice(["hostile", "hostile", "built", "damaged", "kept", "value"])
    made: Any = CHAT_TEMPLATE
    if how == "hostile":
        made = random.choice(HOSTILE)
    elif how == "built":
        made = "".join(random.choice(PARTS) for _ in range(random.randrange(1, 9)))
    elif how == "damaged":
        made = damage_text(CHAT_TEMPLATE.encode(), random)[0].decode("utf-8", "replace")
    elif how == "value":
        made = random.choice(
            [odd_value(random), [{"name": "default", "template": CHAT_TEMPLATE}], {"default": "x"}, [{"name": 5}]]
        )
    file = folder / "chat_template.jinja"
    if isinstance(made, str) and random.random() < 0.6:
        file.write_bytes(made.encode("utf-8", "surrogatepass"))
    else:
        file.unlink()
        config = folder / "tokenizer_config.json"
        found = json.loads(config.read_text())
        found["chat_template"] = made
        config.write_text(json.dumps(found))
    chat = random.choice(CHATS[:2] if random.random() < 0.5 else CHATS)
    changes = [f"chat template {made!r:.120}", f"messages {chat!r:.120}"]

    def ask() -> Answer:
        with house.load(folder, "qwen2") as engine:
            count = engine.count_tokens(chat)
            done = engine.generate(chat, max_tokens=2, ignore_eos=True)
            return {"count": count, "tokens": list(done.token_ids)}

    def refer(answer: Answer, seed: int) -> Answer:
        from transformers import AutoTokenizer

        read = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        ids = read.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        done = house.engine("qwen2").generate(list(ids), max_tokens=2, ignore_eos=True)
        return {"count": len(ids), "tokens": list(done.token_ids)}

    return Attempt(ask, refer, changes=changes)
