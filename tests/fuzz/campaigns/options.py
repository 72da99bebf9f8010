"""Every option of an engine."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import lorax_core as lorax
from fuzz.house import House, our_answer, their_answer
from fuzz.judge import Answer, Attempt, CannotJudge
from fuzz.mutations import odd_value

COUNTS = [None, 0, 1, 2, 16, 48, 256, 10**6, 10**12, 2**63, 10**30, -1, 1.5, math.nan, math.inf, "16", True, []]
VALUES: dict[str, list[Any]] = {
    "revision": [None, "main", "", 5, "../x", "\ud800"], "token": [None, "hunter2", 5, ["hunter2"]],
    "dtype": ["auto", "float32", "float64", "fp32", None, 5], "device": ["auto", "cpu", "cuda", "cuda:99", "mps",
        "meta", "", "cpu:1", 5, None],
    "max_adapters": COUNTS, "max_cpu_adapters": COUNTS, "normalize": [None, 1, "yes"], "embedding_dim": [None, 64,
        24, 0, 10**9, "64"],
    "kv_cache_tokens": COUNTS, "kv_cache_pages": COUNTS, "kv_cache_bytes": [*COUNTS, 10**5, 10**15],
        "kv_cache_fraction": [None, 0, 1e-9, 1e-3, 2, -1, math.nan, "x"],
    "kv_dtype": ["auto", "fp8_e5m2", "int8", 5], "max_batch_tokens": [*COUNTS, 16, 2048], "max_batch_rows": [*COUNTS, 16],
    "attention": [None, "torch", "flash", "", 5, "\ud800"], "speculate": [0, 1, 4, 100, 10**9, -1, "2", math.nan],
        "seed": [0, 1, -1, 2**63, 10**30, 1.5, None, "x"],
    "threads": [0, -1, "2", 1.5, math.nan, None, 1], "checkpoint_x": [1], "max_batch_token": [5], "adapters": [{},
        None, {"a": 5}, {"": "x"}, {"a": "/nowhere"}, ["a"], "a"],
    "linear_methods": [{}, {"lm_head": "plain"}, {"*": "plain"}, {"*": "nope"}, {"": "plain"}, {"nope": "plain"},
        {"(": 5}, ["plain"], "plain"],
    "adapter_sources": [[], (), ("folder",), ["folder", "hub", "url"], ["nope"], "folder", [5], ["/"], [""],
        ["\ud800"], None],
    "max_fetched_adapters": COUNTS, "adapter_timeout": [1, 0.5, 600.0, 0, -1, 10**9, math.nan, math.inf, "5", None],
    "max_adapter_bytes": [*COUNTS, 10**9],
}  # fmt: skip
PLACES: list[Any] = ["", " ", "/nowhere", "nowhere", "a/b", "a/b/c", "~nouser/x", "a\0b", "x" * 5000, "\ud800",
    "/dev/zero", "/etc/passwd", ".", "..", "/", "http://127.0.0.1:9/x", "s3://x/y", 5, None, [], b"x",
    "https://huggingface.co/a/b", "a b/c", "-/-", "org/" + "x" * 300]  # fmt: skip


def options(house: House, random: Random) -> Attempt:
    """`load` with options that do not change greedy answers where they are valid."""
    given: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 64, "pooling": "mean"}
    place: Any = house.root / "qwen2"
    changes = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        if random.random() < 0.15:
            place = random.choice(PLACES)
            changes.append(f"checkpoint = {place!r:.60}")
            continue
        name = random.choice(sorted({*VALUES, *lorax.EngineOptions.model_fields} - {"checkpoint"}))
        value = random.choice(VALUES[name]) if name in VALUES and random.random() < 0.85 else odd_value(random)
        if name == "threads" and isinstance(value, int) and value > 1:
            continue  # a number for the whole process
        if name.startswith("kv_cache"):
            given.pop("kv_cache_tokens", None)
        given[name] = value
        changes.append(f"{name} = {value!r:.60}")
    if random.random() < 0.1:
        given["adapters"] = {
            "good": random.choice([str(house.root / "adapters/qwen2-plain"), house.root / "adapters/qwen2-plain"])
        }
        changes.append("an adapter")

    def ask() -> Answer:
        with lorax.load(place, host=house.host, **given) as engine:
            return our_answer(engine)

    def refer(answer: Answer, seed: int) -> Answer:
        if not isinstance(place, Path):
            raise CannotJudge("another checkpoint")
        if given.get("normalize") or given["pooling"] != "mean":
            raise CannotJudge("other vectors were asked for")
        return their_answer(house.reference("qwen2"), answer)

    return Attempt(ask, refer, changes=changes, secrets=("hunter2",))
