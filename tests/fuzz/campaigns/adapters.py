"""Adapters: PEFT's files, Medusa's heads, sources as words, and merging."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
import warnings
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from fuzz.bases import ADAPTER_BASES, ADAPTER_KINDS
from fuzz.house import House, our_answer, their_answer
from fuzz.judge import Answer, Attempt, CannotJudge, Wrong
from fuzz.mutations import change_header, change_json_file, change_tensor_values, dump_json, nested, odd_value
from fuzz.verdicts import Finding

SLOW = [
    r"(a+)+$",
    r"(.*)*x",
    r"((((.+)+)+)+)y",
    r"(\w+\.?)+!",
    "(" * 500,
    "[",
    "a{1000000}",
    r"(?=x)",
    r"\1",
    "\ud800",
    "x" * 5000,
]
NAMES = ["up_proj", "v_proj", "c_fc", "value", "intermediate.dense", "nope", "", r".*\.0\..*", "all-linear", *SLOW]
NUMBERS: list[Any] = [0, 1, 2, 4, 5, 8, 16, -1, 10**9, 10**30, 1.5, 0.0, math.nan, math.inf, 1e300, "8", None, True]
# What an adapter's settings may plausibly say.
PLAUSIBLE: dict[str, list[Any]] = {
    "r": NUMBERS, "lora_alpha": NUMBERS, "use_rslora": [True, False, None, 1, "no"], "use_dora": [True, False,
        "x"], "lora_bias": [True, False],
    "bias": ["none", "all", "lora_only", "x", 5], "fan_in_fan_out": [True, False], "lora_dropout": [0.5, math.nan,
        "x"], "peft_type": ["LORA", "lora", "IA3", "LOHA", None, 5, ["LORA"]],
    "task_type": [None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "X", 5, ["CAUSAL_LM"]],
        "inference_mode": [True, False],
    "init_lora_weights": [True, False, "gaussian", "pissa", "PiSSA", "olora", "OLoRA", "loftq", "LoftQ", "corda",
        "lora_ga", "eva", "orthogonal", "pissa_niter_4", 5, []],
    "modules_to_save": [None, [], ["norm"], ["lm_head"], ["score"], "norm", 5, [5], ["nope"]],
        "layers_to_transform": [None, 0, 1, [0], [1], [5], "0", []],
    "layers_pattern": [None, "layers", "h", ["x"]], "trainable_token_indices": [None, [1, 2, 3],
        {"embed_tokens": [1]}, {"x": "y"}, "x", [-1], [10**9], [None]],
    "base_model_name_or_path": [None, "x/y", 5, "\ud800"], "revision": [None, "main", 5],
        "exclude_modules": [None, *NAMES, ["v_proj"]],
    "megatron_config": [None, {}, {"x": 1}], "eva_config": [None, {}], "loftq_config": [{}, None, {"x": 1}],
        "use_qalora": [False, True], "alora_invocation_tokens": [None, [1]],
    "target_parameters": [None, [], ["x"]], "layer_replication": [None, [[0, 1]]], "corda_config": [None, {}],
        "arrow_config": [None, {"x": 1}], "x_unknown": [None, False, 1, {"a": 1}],
    "ensure_weight_tying": [True, False], "qalora_group_size": [16, None], "auto_mapping": [None, {},
        {"base_model_class": "X", "parent_library": "os"}], "peft_version": ["0.1", "99", 5, None],
}  # fmt: skip
HARMLESS: dict[str, list[Any]] = {
    "lora_dropout": [0.0, 0.5], "inference_mode": [True, False], "base_model_name_or_path": [None, "x/y"],
        "revision": [None, "main"],
    "peft_version": ["0.9.0", None], "loftq_config": [{}], "megatron_core": ["megatron.core"],
}  # fmt: skip


def adapter(house: House, random: Random) -> Attempt:
    """A LoRA folder of PEFT's, loaded onto the engine of its base and taken off again."""
    base, kind = random.choice(ADAPTER_BASES), random.choice(ADAPTER_KINDS)
    folder = house.copy(f"adapters/{base}-{kind}")
    changes, same = [f"{kind} adapter of {base}"], False
    how = random.random()
    if how < 0.1:
        changes.append(_set(folder, random, HARMLESS, 2))
        same = True
    elif how < 0.4:
        changes.append(_set(folder, random, PLAUSIBLE, random.choice([1, 1, 2])))
    elif how < 0.55:
        changes.append(_set_patterns(folder, random))
    else:
        for _ in range(random.choice([1, 1, 2])):
            with contextlib.suppress(Exception):  # the second change may find nothing that it can read
                changes += _change(folder, random)
    return _loaded(house, base, folder, changes, same=same)


def _change(folder: Path, random: Random) -> list[str]:
    tensors = folder / "adapter_model.safetensors"
    how = random.random()
    if how < 0.45:
        return [change_tensor_values(tensors, random)]
    if how < 0.65:
        return [change_header(tensors, random)]
    if how < 0.7:
        other = random.choice(
            [
                "adapter_model.bin",
                "adapter_model-00001-of-00002.safetensors",
                "adapter_model-1-of-x.safetensors",
                "config.json",
                "model.safetensors",
            ]
        )
        tensors.rename(folder / other)
        return [f"{tensors.name} is called {other}"]
    return change_json_file(folder / "adapter_config.json", random, random.choice([1, 1, 3]))


def _set(folder: Path, random: Random, values: dict[str, list[Any]], count: int) -> str:
    file = folder / "adapter_config.json"
    found = json.loads(file.read_text())
    said = []
    for _ in range(count):
        key = random.choice(sorted(values))
        found[key] = random.choice(values[key])
        if values is PLAUSIBLE and random.random() < 0.1:
            found[key] = odd_value(random)
        said.append(f"{key} = {found[key]!r:.80}")
    file.write_text(dump_json(found))
    return f"adapter_config.json: {', '.join(said)}"


def _set_patterns(folder: Path, random: Random) -> str:
    file = folder / "adapter_config.json"
    found = json.loads(file.read_text())
    key = random.choice(["alpha_pattern", "alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
    pool: list[Any] = [
        {random.choice(NAMES): random.choice(NUMBERS)},
        {random.choice(NAMES): 2, random.choice(NAMES): 8},
        random.choice(NAMES),
        [random.choice(NAMES)],
        nested(3),
        {},
    ]
    if "pattern" in key and random.random() < 0.8:
        pool = pool[:2]
    found[key] = random.choice(pool)
    file.write_text(dump_json(found))
    return f"adapter_config.json: {key} = {found[key]!r:.100}"


def _loaded(house: House, base: str, folder: Path, changes: list[str], *, same: bool = False) -> Attempt:
    def ask() -> Answer:
        engine = house.engine(base)
        engine.adapters.load("fuzzed", folder)
        try:
            return our_answer(engine, "fuzzed")
        finally:
            engine.adapters.unload("fuzzed")

    def refer(answer: Answer, seed: int, dtype: torch.dtype = torch.float32) -> Answer:
        from peft import PeftModel

        if "labels 0" in answer:
            raise CannotJudge("a head of the adapter's own")
        torch.manual_seed(seed)
        bare = copy.deepcopy(house.reference(base)).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(bare, str(folder)).eval().to(dtype)
        return their_answer(model.base_model.model, answer)

    return Attempt(ask, refer, partial(refer, dtype=torch.float64), changes=changes, same=same, engines=(base,))


def medusa(house: House, random: Random) -> Attempt:
    """Medusa heads, with a LoRA adapter beside them or alone: whatever they draft, answers stay the base's."""
    folder = house.copy("adapters/medusa")
    file = folder / "medusa_lm_head.safetensors"
    changes: list[str] = []
    for _ in range(random.choice([1, 1, 2])):
        with contextlib.suppress(Exception):  # the second change may find nothing that it can read
            how = random.random()
            if how < 0.3:
                found = json.loads((folder / "config.json").read_text())
                key = random.choice(["medusa_num_heads", "medusa_num_layers", "base_model_name_or_path"])
                found[key] = random.choice([0, 1, 2, 3, 10**9, 10**30, -1, 2.0, math.nan, True, "2", None, []])
                (folder / "config.json").write_text(dump_json(found))
                changes.append(f"config.json: {key} = {found[key]!r:.60}")
            elif how < 0.5:
                changes += change_json_file(folder / "config.json", random)
            else:
                changes.append((change_header if how < 0.65 else change_tensor_values)(file, random))
    return _base_stays(house, folder, changes)


def _base_stays(house: House, folder: Path, changes: list[str]) -> Attempt:
    def ask() -> Answer:
        engine = house.engine("qwen2")
        engine.adapters.load("fuzzed", folder)
        try:
            return our_answer(engine, "fuzzed")
        finally:
            engine.adapters.unload("fuzzed")

    def refer(answer: Answer, seed: int) -> Answer:
        return their_answer(house.reference("qwen2"), answer)

    return Attempt(ask, refer, changes=changes)


SECRET = "hunter2"
SOURCES: list[Any] = [
    f"zip://x::http://user:{SECRET}@127.0.0.1:9/x", f"http://user:{SECRET}@127.0.0.1:9/x/y",
        "blockcache::http://127.0.0.1:9/x", "reference://", "dir::file:///etc",
    f"simplecache::zip://*::ftp://user:{SECRET}@127.0.0.1:9/x.zip", "file:///etc", "file:///nowhere",
        "memory://x", "local://etc", "data:,x", "s3://127.0.0.1/x", f"s3://user:{SECRET}@x/y",
    "github://a:b@main/", "hf://a/b", "ftp://127.0.0.1:9/x", "sftp://127.0.0.1/x", "ssh://x/y", "jupyter://x",
        "arrow_hdfs://x", "libarchive://x::file:///etc/passwd", "zip://x::/etc/passwd",
    "tar://x::file:///nowhere", "filecache::file:///etc", "async_wrapper://x", "://", "http://", "x://y", "a/b",
        "a/b/c", "org/name@main", "/etc", "/etc/passwd", "/nowhere/x", "../x", "./x", "~nouser/x", "~/x", ".", "",
    "\0", "a/\0", "a/b\ud800", "x" * 5000, "a/" + "x" * 5000, 5, None, 1.5, [], b"x", {"a": 1}, {"good": 1.0},
        {"good": math.nan}, {"a/b": 1.0}, {}, ["good"], True, "good", "Good", "good ", "\\\\host\\share", "C:\\x",
        "https://huggingface.co/a/b?token=" + SECRET,
]  # fmt: skip


def source(house: House, random: Random) -> Attempt:
    """Where an adapter is said to come from: by `adapters.load`, and by a request that names it."""
    place = random.choice(SOURCES)
    if isinstance(place, str) and random.random() < 0.3:
        # Not within the credentials, which would then be none.
        at = random.choice([at for at in range(len(place) + 1) if SECRET not in place or at <= place.find("//") + 1])
        place = place[:at] + random.choice(["/", ":", "::", "..", "%2e", " ", "é", "?", "#", "@"]) + place[at:]
    way = random.choice(["load", "request", "request"])

    def ask() -> Answer:
        engine = house.engine("qwen2")
        if way == "load":
            engine.adapters.load("fuzzed", place)
            engine.adapters.unload("fuzzed")
            return {}
        done = engine.generate([5, 6, 7], adapter=place, max_tokens=2)
        return {"tokens": list(done.token_ids)}

    def refer(answer: Answer, seed: int) -> Answer:
        raise CannotJudge("it names an adapter that is there")

    secrets = (SECRET, "root:x:") if isinstance(place, str) else ()
    return Attempt(ask, refer, changes=[f"{way}: {place!r:.100}"], secrets=secrets)


def merge(house: House, random: Random) -> Attempt:
    """Merging mutated files, on disk and at load: both answer as the base with the adapter, and nothing else is written."""
    import lorax_core as lorax

    kind = random.choice(["plain", "rslora", "dora", "saved"])
    checkpoint, folder = house.copy("sharded"), house.copy(f"adapters/qwen2-{kind}")
    out = checkpoint.parent / "out"
    changes: list[str] = []
    index = checkpoint / "model.safetensors.index.json"
    shard = "model-00001-of-00005.safetensors"
    with contextlib.suppress(Exception):  # a change may find nothing that it can read
        how = random.choice(["names", "names", "adapter", "config", "index", "same"])
        if how == "names":
            target = random.choice(
                [f"../{shard}", str(checkpoint.parent / shard), f"sub/../../{shard}", "", "x/y", ".", "\0"]
            )
            found = json.loads(index.read_text())
            if target.endswith(shard):
                (checkpoint / shard).rename(checkpoint.parent / shard)
            found["weight_map"] = {
                key: target if value == shard else value for key, value in found["weight_map"].items()
            }
            index.write_text(json.dumps(found))
            changes.append(f"the index names {target!r}")
        elif how == "adapter":
            changes += _change(folder, random)
        elif how == "config":
            changes += change_json_file(checkpoint / "config.json", random)
        elif how == "index":
            changes += change_json_file(index, random)
    before, at_load = _listing(checkpoint.parent), random.random() < 0.4

    def ask() -> Answer:
        if at_load:
            with house.load(checkpoint, "qwen2", merge_adapter=str(folder)) as engine:
                return our_answer(engine)
        shutil.rmtree(out, ignore_errors=True)
        lorax.merge_into_base(checkpoint, folder, out)
        with house.load(out, "qwen2") as engine:
            return our_answer(engine)

    def refer(answer: Answer, seed: int) -> Answer:
        with house.load(checkpoint, "qwen2") as engine:
            try:
                engine.adapters.load("fuzzed", folder)
            except lorax.LoraxError as error:
                raise Wrong(f"merging takes an adapter that loading refuses: {error.message}") from error
            expected = our_answer(engine, "fuzzed")
        return {**expected, **{key: value for key, value in answer.items() if key.startswith("greedy")}}

    def check() -> tuple[Finding, str] | None:
        now = {name: mark for name, mark in _listing(checkpoint.parent).items() if not name.startswith("out")}
        strange = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
        return (Finding.OUTSIDE, f"changed: {strange[:4]}") if strange else None

    return Attempt(ask, refer, changes=changes, same=not changes, check=check)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
