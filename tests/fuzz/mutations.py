"""How values, JSON files, texts and safetensors files are damaged.

Decides nothing of what a mutation should lead to. Every choice is drawn from the `Random` of the case, so a case is the same
in every process.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HUGE = "<a number of 5000 digits>"  # Python writes no such number; it is put into the text afterwards
ODD_TEXTS = [
    "",
    " ",
    "x",
    "5",
    "\ud800",
    "a\0b",
    "é\u2028\f",
    "\U0001f600",
    "a" * 5000,
    "../x",
    "/etc/passwd",
    "~nouser/x",
]
ODD_NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 7, 100, 10**5, 10**9, 2**31, 2**63, 2**64, 10**30, -(10**9),
    0.0, -0.0, 0.5, 1.5, -2.5, 1e-300, 1e300, 1e38, math.inf, -math.inf, math.nan,
]  # fmt: skip


def nested(depth: int) -> Any:
    """Lists in lists."""
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


def odd_value(random: Random) -> Any:
    """A value that is seldom what was expected."""
    made: Callable[[], Any] = random.choice(
        [
            lambda: None,
            lambda: random.choice([True, False]),
            lambda: random.choice(ODD_NUMBERS),
            lambda: random.choice(ODD_NUMBERS),
            lambda: random.choice(ODD_TEXTS),
            lambda: HUGE,
            lambda: random.choice([[], [None], [1, 2], ["x"], [[]], [1.5, "x", None]]),
            lambda: random.choice([{}, {"x": 1}, {"": None}, {"0": {"1": []}}]),
            lambda: nested(random.choice([5, 90, 300])),
        ]
    )
    return made()


def nudged(value: Any, random: Random) -> Any:
    """A value near a given one: another number, a list with more or fewer items, other text."""
    if isinstance(value, bool):
        return random.choice([not value, int(value), str(value).lower(), None])
    if isinstance(value, (int, float)):
        steps = [value + 1, value - 1, value * 2, -value, value / 2, value // 2, float(value), str(value), 0, [value]]
        return random.choice(steps)
    if isinstance(value, str):
        return random.choice([value.upper(), value + "x", value[:-1], value * 2, [value], "", value.swapcase()])
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        kept = value[:at] + value[at + 1 :]
        return random.choice([kept, [*value, value[at]], list(reversed(value)), value[at], [*value, None]])
    if isinstance(value, dict) and value:
        key = random.choice(sorted(value))
        return random.choice([{k: v for k, v in value.items() if k != key}, {**value, "x": value[key]}, list(value)])
    return odd_value(random)


def paths(value: Any, at: tuple[Any, ...] = (), limit: int = 400) -> list[tuple[Any, ...]]:
    """The places inside a parsed JSON value, the outer ones first; of long lists and objects only some."""
    found: list[tuple[Any, ...]] = []
    level = [(at, value)]
    while level and len(found) < limit:
        below = []
        for path, item in level:
            steps = (
                list(item.items())[:60]
                if isinstance(item, dict)
                else list(enumerate(item))[:8]
                if isinstance(item, list)
                else []
            )
            for key, inner in steps:
                found.append((*path, key))
                below.append(((*path, key), inner))
        level = below
    return found


def change_value(root: Any, random: Random) -> tuple[Any, str]:
    """One change somewhere inside a JSON value, and what it was."""
    places = paths(root)
    if not places or random.random() < 0.03:
        made = odd_value(random)
        return made, f"the whole = {made!r:.60}"
    path = random.choice(places)
    parent = root
    for step in path[:-1]:
        parent = parent[step]
    key = path[-1]
    name = ".".join(map(str, path))
    how = random.choice(["delete", "odd", "odd", "nudge", "nudge", "nudge", "swap", "rename"])
    if how == "delete":
        del parent[key]
        return root, f"{name} deleted"
    if how == "swap":
        other = random.choice(places)
        value = root
        for step in other:
            value = value[step]
        parent[key] = json.loads(json.dumps(value)) if other[: len(path)] != path else None
        return root, f"{name} = what stands at {'.'.join(map(str, other))}"
    if how == "rename" and isinstance(parent, dict):
        new = nudged(key, random)
        parent[str(new)] = parent.pop(key)
        return root, f"{name} renamed to {new!r:.40}"
    parent[key] = odd_value(random) if how == "odd" else nudged(parent[key], random)
    return root, f"{name} = {parent[key]!r:.60}"


def dump_json(value: Any) -> str:
    """JSON as Python writes it, NaN and lone surrogates included, and numbers that it would not write."""
    return json.dumps(value).replace(json.dumps(HUGE), "1" * 5000)


def damage_text(data: bytes, random: Random) -> tuple[bytes, str]:
    """A file's bytes, damaged below the level of its format."""
    at = random.randrange(len(data)) if data else 0
    ways: list[tuple[str, Callable[[], bytes]]] = [
        (f"cut at byte {at}", lambda: data[:at]),
        (f"byte {at} changed", lambda: data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]),
        (f"invalid UTF-8 at byte {at}", lambda: data[:at] + b"\xff\xfe" + data[at:]),
        ("a byte order mark", lambda: b"\xef\xbb\xbf" + data),
        ("in UTF-16", lambda: data.decode(errors="replace").encode("utf-16")),
        ("empty", lambda: b""),
        ("twice", lambda: data + data),
        (f"NUL at byte {at}", lambda: data[:at] + b"\0" + data[at:]),
        ("100,000 brackets", lambda: b"[" * 100_000),
        ("100,000 objects", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("5,000 digits", lambda: b"1" * 5000),
        ("null", lambda: b"null"),
        ("a list", lambda: b"[]"),
    ]
    what, make = random.choice(ways)
    return make(), what


def damage_file(file: Path, random: Random) -> str:
    """A file replaced by something that is no file, or by none."""
    how = random.choice(["gone", "folder", "pipe", "dangling link", "looping link", "device"])
    if file.exists():
        file.unlink()
    match how:
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "dangling link":
            file.symlink_to(file.with_name("nowhere"))
        case "looping link":
            file.symlink_to(file.name)
        case "device":
            file.symlink_to("/dev/zero")
        case _:
            pass
    return f"{file.name} is {how}"


def regular(file: Path) -> Path:
    """The file itself; OSError when an earlier change made something else of it, which no further change may open."""
    if not file.is_file():
        raise OSError(f"{file} is not a regular file")
    return file


def change_json_file(file: Path, random: Random, changes: int = 1) -> list[str]:
    """Some changes to a JSON file: inside its value mostly, else to its bytes, seldom to the file itself."""
    if random.random() < 0.04:
        return [damage_file(file, random)]
    if random.random() < 0.06:
        data, what = damage_text(regular(file).read_bytes(), random)
        file.write_bytes(data)
        return [f"{file.name}: {what}"]
    value = json.loads(regular(file).read_text(encoding="utf-8"))
    done = []
    for _ in range(changes):
        value, what = change_value(value, random)
        done.append(f"{file.name}: {what}")
        if not isinstance(value, dict | list):
            break
    file.write_text(dump_json(value), encoding="utf-8")
    return done


def change_header(file: Path, random: Random) -> str:
    """One change to the header of a safetensors file, or to the bytes around it."""
    data = regular(file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = random.choice(["value", "value", "value", "length", "cut", "more", "bytes", "file"])
    if how == "file":
        return damage_file(file, random)
    what, length = "", None
    if how == "value":
        header, what = change_value(header, random)
    elif how == "length":
        length = random.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data), 10**8 + 1])
        what = f"header length {length}"
    elif how == "cut":
        body = body[: random.randrange(len(body))]
        what = f"body cut to {len(body)} bytes"
    elif how == "more":
        body += b"\0" * random.choice([1, 8, 1000])
        what = "more bytes than named"
    text = dump_json(header).encode()
    if how == "bytes":
        text, what = damage_text(text, random)
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return f"{file.name}: {what}"


def change_tensor_values(file: Path, random: Random) -> str:
    """Numbers, shapes, dtypes or names of the tensors of a file, written again as a whole and valid file."""
    tensors = load_file(regular(file))
    name = random.choice(sorted(tensors))
    tensor = tensors[name]
    how = random.choice(
        ["nan", "inf", "large", "tiny", "zero", "f64", "f16", "bf16", "int", "bool", "fp8", "transpose", "flat", "scalar",
         "3d", "wider", "narrower", "empty", "gone", "extra", "renamed", "copied", "scaled"]
    )  # fmt: skip
    match how:
        case "nan" | "inf" | "large" | "tiny":
            number = {"nan": math.nan, "inf": math.inf, "large": random.choice([1e6, 1e30, 3e38]), "tiny": 1e-40}[how]
            changed = tensor.clone().flatten()
            changed[random.randrange(len(changed))] = number
            tensors[name] = changed.reshape(tensor.shape)
            how = f"{how} {number}"
        case "zero":
            tensors[name] = torch.zeros_like(tensor)
        case "scaled":
            factor = random.choice([-1.0, 0.5, 2.0, 100.0, 1e20])
            tensors[name] = tensor * factor
            how = f"scaled by {factor}"
        case "f64":
            number = random.choice([1.0, 1e300])
            tensors[name] = tensor.double() * number
            how = f"float64 times {number}"
        case "f16" | "bf16" | "int" | "bool" | "fp8":
            kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "int": torch.int64, "bool": torch.bool}
            tensors[name] = tensor.to(kinds.get(how, torch.float8_e4m3fn))
        case "transpose":
            tensors[name] = tensor.mT.contiguous() if tensor.ndim > 1 else tensor[:, None].contiguous()
        case "flat":
            tensors[name] = tensor.flatten()
        case "scalar":
            tensors[name] = tensor.flatten()[0].clone()
        case "3d":
            tensors[name] = tensor[None].clone()
        case "wider":
            tensors[name] = torch.cat([tensor, tensor])
        case "narrower":
            tensors[name] = tensor[:-1].clone()
        case "empty":
            tensors[name] = tensor[:0].clone()
        case "gone":
            del tensors[name]
        case "extra":
            new = random.choice(
                ["x", "model.x.weight", name + ".weight", "\u00e9", name.upper(), "rotary_emb.inv_freq"]
            )
            tensors[new] = tensor.clone()
            how = f"also as {new!r}"
        case "renamed":
            new = nudged(name, random)
            tensors[str(new)] = tensors.pop(name)
            how = f"renamed {new!r:.40}"
        case _:
            other = random.choice(sorted(tensors))
            tensors[name] = tensors[other].clone()
            how = f"a copy of {other}"
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {how}"
