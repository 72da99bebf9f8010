"""Requests: every field, texts, and the calls themselves. The reference is a plain greedy loop over transformers' logits."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch

import lorax_core as lorax
from fuzz.house import CACHE, House, their_answer
from fuzz.judge import Answer, Attempt, CannotJudge
from fuzz.mutations import odd_value

VOCAB, EOS = 320, 256
# Values that are right, and by themselves or with others may still be refused.
RIGHT: dict[str, list[Any]] = {
    "max_tokens": [1, 2, 4, 6], "min_tokens": [0, 1, 3],
    "truncate_prompt_tokens": [None, 1, 2, 99], "top_k": [None, 1, 5, 10**6], "top_p": [0.1, 0.9, 1.0],
        "min_p": [0.0, 0.3, 1.0],
    "typical_p": [0.2, 1.0], "repetition_penalty": [0.5, 1.0, 1.3, 5.0], "presence_penalty": [-2.0, 0.5, 2.0],
        "frequency_penalty": [-1.0, 0.5, 2.0],
    "logit_bias": [{}, {5: 100.0}, {7: -100.0, 8: 5}, {EOS: 50.0}], "seed": [None, 0, 1, 2**62, -5], "stop": ["",
        [], "a", ["th", "zz"], "\u00e9"],
    "stop_token_ids": [[], [5], [40, 41]], "ignore_eos": [True, False], "logprobs": [None, 0, 3, 100],
        "prompt_logprobs": [None, 0, 2], "n": [1, 2, 3], "priority": [0, -100, 100],
    "adapter": [None, "good"], "temperature": [0.0, 0],
}  # fmt: skip
WRONG: list[Any] = [-1, 0, 10**9, 10**30, 1.5, math.nan, math.inf, -math.inf, "5", "", None, True, [], [5], {},
    {"a": 1}, {5: math.nan}, {-1: 1.0}, {320: 1.0}, {"5": 1.0}, {5: "x"}, [320], [-1], [10**30], [None], ["a", 5],
    "\ud800", ["\ud800"], "x" * 100_000, b"x", 1j, object]  # fmt: skip
PROMPTS: list[Any] = [[5, 9, 2, 77], [30], [256, 256], list(range(20)), [5] * 200, [5] * 400, [320], [-1], [10**30],
    [True], [1.5], [], "", "hello", "\ud800", "a\0b", [[5]], [{}], None, 5, b"x", ("a", "b"), ["a"], {"a": 1}, [5, "x"],
    "x" * 100_000]  # fmt: skip


def request(house: House, random: Random) -> Attempt:
    """One or several generating requests in one batch, every field of them."""
    made = [_fields(random) for _ in range(random.choice([1, 1, 1, 3]))]
    changes = [", ".join(f"{key}={value!r:.60}" for key, value in fields.items()) for fields in made]

    def ask() -> Answer:
        requests = [lorax.GenerateRequest(**fields) for fields in made]
        found: dict[str, Any] = {}
        for at, done in enumerate(house.engine("qwen2").run(requests)):
            found[f"tokens {at}"] = list(done.token_ids)
            found[f"why {at}"] = str(done.finish_reason)
            found[f"others {at}"] = [list(other.token_ids) for other in done.alternatives]
            if done.logprobs is not None:
                found[f"logprobs {at}"] = [float(one.logprob) for one in done.logprobs]
        return found

    def refer(answer: Answer, seed: int) -> Answer:
        found: dict[str, Any] = {}
        for at, fields in enumerate(made):
            if fields.get("temperature"):
                raise CannotJudge("the answer is drawn")
            if any(fields.get(key) is not None for key in ("json_schema", "regex", "choice")):
                raise CannotJudge("the answer is constrained")
            tokens, why, logprobs = greedy(house, fields, answer[f"tokens {at}"])
            found[f"tokens {at}"], found[f"why {at}"] = tokens, why
            found[f"others {at}"] = [tokens] * (fields.get("n", 1) - 1)
            if fields.get("logprobs") is not None:
                found[f"logprobs {at}"] = logprobs
        return found

    return Attempt(ask, refer, changes=changes)


def _fields(random: Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": random.choice(PROMPTS[:4]), "max_tokens": random.choice([1, 3, 6])}
    for key in random.sample(sorted(RIGHT), random.choice([1, 3, 6])):
        fields[key] = random.choice(RIGHT[key])
    how = random.random()
    if how < 0.1:
        fields["prompt"] = random.choice(PROMPTS)
    elif how < 0.45:
        key = random.choice(sorted({*lorax.GenerateRequest.model_fields, "max_new_tokens"} - {"prompt"}))
        fields[key] = random.choice(WRONG) if random.random() < 0.8 else odd_value(random)
    elif how < 0.6:
        fields["temperature"] = random.choice([0.7, 1, 100.0])
    if fields.get("temperature") and fields.get("seed") is None:
        fields["seed"] = 4  # without one, an answer may differ from the last
    return fields


@torch.inference_mode()
def greedy(house: House, fields: dict[str, Any], ours: list[int]) -> tuple[list[int], str, list[float]]:
    """A greedy answer with penalties, biases and ends as the request's documentation has them, one whole pass a token.

    Where two tokens are equally good as far as rounding goes, the one in `ours` is followed.
    """
    model, tokenizer = adapted(house, fields.get("adapter")), house.tokenizers["qwen2"]
    prompt, out, logprobs = fields["prompt"], [], []
    prompt = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    prompt = prompt[-(fields.get("truncate_prompt_tokens") or len(prompt)) :]
    ends = {*fields.get("stop_token_ids", []), *([] if fields.get("ignore_eos") else [EOS])}
    stops = fields.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    unsearched = 0  # characters that came before min_tokens
    limit = fields["max_tokens"] if fields.get("max_tokens") is not None else CACHE - len(prompt)
    while len(out) < limit:
        raw = model(torch.tensor([[*prompt, *out]])).logits[0, -1].double()
        row = processed(raw, fields, prompt, out, ends)
        token = int(row.argmax())
        if (
            len(out) < len(ours)
            and ours[len(out)] != token
            and row[token] - row[ours[len(out)]] < 1e-3 * max(1.0, float(raw.abs().max()))
        ):
            token = ours[len(out)]
        out.append(token)
        logprobs.append(float(raw.log_softmax(-1)[token]))
        if token in ends:
            return out, "stop", logprobs
        text = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(out) < fields.get("min_tokens", 0):
            unsearched = len(text)
        elif any(stop in text[unsearched:] for stop in stops):
            return out, "stop", logprobs
    return out, "length", logprobs


def adapted(house: House, name: str | None) -> Any:
    """The oracle of Qwen2, with the adapter "good" where it is named."""
    model = house.reference("qwen2")
    if name is None:
        return model
    if not hasattr(model, "fuzz_good"):
        import copy

        from peft import PeftModel

        good = PeftModel.from_pretrained(copy.deepcopy(model), str(house.root / "adapters/qwen2-plain")).eval()
        object.__setattr__(model, "fuzz_good", good)
    return model.fuzz_good


def processed(
    raw: torch.Tensor, fields: dict[str, Any], prompt: list[int], out: list[int], ends: set[int]
) -> torch.Tensor:
    """The logits that a token is chosen from."""
    row = raw.clone()
    penalty = fields.get("repetition_penalty", 1.0)
    for token in {*prompt, *out}:
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token in set(out):
        row[token] -= fields.get("presence_penalty", 0.0) + fields.get("frequency_penalty", 0.0) * out.count(token)
    for token, bias in fields.get("logit_bias", {}).items():
        row[token] += bias
    if len(out) < fields.get("min_tokens", 0):
        row[sorted(ends)] = -math.inf
    return row


INPUTS: list[Any] = [[5, 9, 2, 77], [30], "ab c", ("ab", "c d"), "x " * 200, [5] * 200, ("a " * 90, "b " * 5), "",
    ("", ""), [], [200], [-1], [10**30], "\ud800", ("a", "\ud800"), "a\0b", ("a",), ("a", 5), None, 5, [None], [[5]],
    [{}], {"a": 1}, b"x", "\u2028\f", ["a", "b"], "x" * 200_000]  # fmt: skip


# Options of texts that are right, by the kind of request.
ASKED: dict[str, dict[str, list[Any]]] = {
    "EmbedRequest": {"pooling": ["cls", "mean", "last", "none", None], "normalize": [True, False, None],
        "dimensions": [1, 9, 64, None], "prompt": ["", "a: ", None]},
    "ClassifyRequest": {"raw_scores": [True, False]}, "RerankRequest": {"normalize": [True, False]},
}  # fmt: skip


def text(house: House, random: Random) -> Attempt:
    """Texts to embed, to classify and to rerank, what is asked of them, and how they are truncated."""
    name = random.choice(["bert", "bert-tokens", "bert-texts", "bert-pairs", "qwen2", "qwen2-texts"])
    kind = random.choice([lorax.EmbedRequest, lorax.ClassifyRequest, lorax.RerankRequest])
    inputs = INPUTS[:7] if random.random() < 0.5 else INPUTS
    names = [field for field in kind.model_fields if field in ("input", "query", "document")]
    fields: dict[str, Any] = {field: random.choice(inputs) for field in names}
    if random.random() < 0.5:
        fields["truncate"] = random.choice(["error", "start", "end", "middle", None, 5])
    for option, values in ASKED[kind.__name__].items():
        if random.random() < 0.3:
            fields[option] = random.choice(values)
    if random.random() < 0.15:
        fields[random.choice(sorted({*kind.model_fields, "x"} - {*names}))] = random.choice(WRONG)
    given = fields["input"] if "input" in fields else (fields["query"], fields["document"])

    def ask() -> Answer:
        done = house.engine(name).run([kind(**fields)])[0]
        found: dict[str, Any] = {"tokens": done.usage.prompt_tokens}
        if isinstance(done, lorax.Embedding):
            return {**found, "vector 0": [float(number) for number in done.vector.ravel()]}
        if isinstance(done, lorax.Relevance):
            return {**found, "scores 0": [done.score]}
        return {**found, "labels 0": list(done.labels), "scores 0": [float(score) for score in done.scores]}

    def refer(answer: Answer, seed: int) -> Answer:
        asked = {key: value for key, value in answer.items() if key != "tokens"}
        model, kept, types = house.reference(name), _prompted(given, fields.get("prompt")), None
        if not isinstance(given, list):
            kept, types = _read(house, name, kept, fields.get("truncate", "error"))
            if "labels 0" in answer and name == "bert-tokens":
                raise CannotJudge("special tokens have no labels")
        elif answer["tokens"] < len(given):
            kept = given[-answer["tokens"] :] if fields["truncate"] == "start" else given[: answer["tokens"]]
        return {"tokens": len(kept), **_their_text(model, asked, kept, types, fields)}

    return Attempt(ask, refer, changes=[f"{kind.__name__} to {name}: {fields!r:.200}"], engines=(name,))


def _prompted(given: Any, prompt: str | None) -> Any:
    if prompt is None or isinstance(given, list):
        return given
    return prompt + given if isinstance(given, str) else (prompt + given[0], given[1])


@torch.inference_mode()
def _their_text(model: Any, answer: Answer, ids: list[int], types: list[int] | None, fields: dict[str, Any]) -> Answer:
    """What the oracle says of one text with these options."""
    typed = {} if types is None else {"token_type_ids": torch.tensor([types])}
    if "vector 0" in answer:
        rows = model.base_model(torch.tensor([ids]), **typed).last_hidden_state[0].float()
        pooling = fields.get("pooling") or "mean"
        found = {"cls": rows[0], "last": rows[-1], "mean": rows.mean(0), "none": rows}[pooling][
            ..., : fields.get("dimensions")
        ]
        found = torch.nn.functional.normalize(found, dim=-1) if fields.get("normalize") else found
        return {"vector 0": found.flatten().tolist()}
    if "labels 0" not in answer:
        logits = model(torch.tensor([ids]), **typed).logits[0].float()
        return {"scores 0": (logits.sigmoid() if fields.get("normalize", True) else logits).tolist()}
    found = their_answer(model, answer, [ids], types)
    if fields.get("raw_scores"):
        logits = model(torch.tensor([ids]), **typed).logits[0].float()
        found["scores 0"] = (
            logits.max(-1).values if logits.ndim == 2 else logits.sort(descending=True).values
        ).tolist()
    return found


def _read(house: House, name: str, given: Any, truncate: str) -> tuple[list[int], list[int] | None]:
    """Ids and token types of a string or pair, cut at the end where that was asked for."""
    tokenizer, limit = house.tokenizers[name], house.engine(name).info().max_text_tokens
    made = tokenizer(*((given,) if isinstance(given, str) else given))
    if len(made["input_ids"]) > limit:
        if truncate != "end" or not isinstance(given, str):
            raise CannotJudge("the libraries cut pairs, and beginnings, in ways of their own")
        made = tokenizer(given, truncation=True, max_length=limit)
    return made["input_ids"], made.get("token_type_ids") if "token_type_ids" in tokenizer.model_input_names else None


THINGS: list[Any] = [None, 5, 1.5, True, "x", "", [], [None], [5], ["x"], {}, {"x": 1}, b"x", object(), (), ("a",),
    [[]], [[5], [6]], [{}], lorax.LoraxError("x"), math.nan, "\ud800"]  # fmt: skip


def api(house: House, random: Random) -> Attempt:
    """Calls of an engine and of its adapters with arguments of any type."""
    one, two = random.choice(THINGS), random.choice(THINGS)
    good = str(house.root / "adapters/qwen2-plain")
    keyword = random.choice(["revision", "token", "task", "problem_type", "id2label", "pin"])
    calls: dict[str, Any] = {
        "run": lambda e: e.run(one), "submit": lambda e: e.submit(one).wait(),
            "run of one": lambda e: e.run([one]), "count_tokens": lambda e: e.count_tokens(one),
        "generate": lambda e: e.generate(one, max_tokens=2),
            "generate with adapter": lambda e: e.generate([5], adapter=one, max_tokens=2),
        "generate several": lambda e: e.generate([[5], [6]], adapter=one, max_tokens=1),
            "embed": lambda e: e.embed(one), "embed truncate": lambda e: e.embed([5], truncate=one),
        "classify": lambda e: e.classify(one), "stream": lambda e: list(e.stream(one, max_tokens=2)),
            "adapters.load": lambda e: e.adapters.load(one, two),
        "adapters.load of good": lambda e: (e.adapters.load("fuzzed", good, **{keyword: one}),
            e.adapters.unload("fuzzed")), "adapters.load as": lambda e: (e.adapters.load(one, good),
            e.adapters.unload(one)),
        "adapters.unload": lambda e: e.adapters.unload(one if one != "good" else two),
            "GenerateRequest": lambda e: lorax.GenerateRequest(prompt=one,
            adapter=two),
        "EmbedRequest": lambda e: lorax.EmbedRequest(input=one, truncate=two),
            "load": lambda e: lorax.load(one), "EngineOptions": lambda e: lorax.EngineOptions(checkpoint=one,
            adapters=two),
        "merge_adapters": lambda e: lorax.merge_adapters(one, two),
    }  # fmt: skip
    name = random.choice(sorted(calls))

    def ask() -> Answer:
        calls[name](house.engine("qwen2"))
        return {}

    def refer(answer: Answer, seed: int) -> Answer:
        raise CannotJudge("a call that was taken")

    return Attempt(ask, refer, changes=[f"{name}({one!r:.60}, {two!r:.60}, {keyword})"])
