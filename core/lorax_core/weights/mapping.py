"""How the tensor names of a checkpoint become the parameters of a model.

Decides names only: prefixes, renames, fusions, transposes, ties and what is ignored, matched on whole dotted segments.
Knows nothing of files or numbers. Each architecture declares its own map, so no central table knows architectures.

In a pattern `*` stands for one segment and `**` for any number, also none; both are carried over to the replacement in
order. `layers.*.attn.bias` therefore never means `layers.0.c_attn.bias`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: a parameter's canonical name, and for a fused layer which of its parts it is."""

    name: str
    part: int | None = None
    transpose: bool = False


@dataclass(frozen=True)
class WeightMap:
    """The declarative map of one architecture. Every field is optional.

    - `prefixes`: leading segments that some checkpoints carry and others do not (`model`, `bert`).
    - `rename`: pattern to replacement, the first match wins (`{"**.gamma": "**.weight"}`).
    - `fuse`: a fused module to the names of its members beside it, in the layer's order
      (`{"layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")}`).
    - `transpose`: patterns of tensors stored `[in, out]`.
    - `tie`: parameter to the parameter whose numbers it shares when the checkpoint has none of its own.
    - `ignore`: patterns of tensors that inference does not need.
    """

    prefixes: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    fuse: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transpose: tuple[str, ...] = ()
    tie: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def resolve(self, name: str) -> Target | None:
        """The target of a checkpoint tensor, or None when the map ignores it. Does not ask whether the target exists."""
        name = self.canonical(name)
        if any(_matches(pattern, name) for pattern in self.ignore):
            return None
        module, _, leaf = name.rpartition(".")
        transpose = any(_matches(pattern, name) for pattern in self.transpose)
        fused = self.resolve_module(module)
        return Target(f"{fused.name}.{leaf}" if module else leaf, fused.part, transpose)

    def resolve_module(self, module: str) -> Target:
        """The target of a module's name as checkpoints or adapters give it."""
        module = self.canonical(module)
        for pattern, members in self.fuse.items():
            parent, _, fused = pattern.rpartition(".")
            for part, member in enumerate(members):
                replaced = _replace(f"{parent}.{member}", f"{parent}.{fused}", module)
                if replaced is not None:
                    return Target(replaced, part)
        return Target(module)

    def canonical(self, name: str) -> str:
        """The name without a known prefix and under its current spelling."""
        for prefix in self.prefixes:
            if name.startswith(prefix + "."):
                name = name[len(prefix) + 1 :]
                break
        for pattern, replacement in self.rename.items():
            replaced = _replace(pattern, replacement, name)
            if replaced is not None:
                return replaced
        return name

    def members(self, module: str) -> tuple[str, ...]:
        """The checkpoint's names for a module of the model: its members when it is fused, else itself."""
        for pattern, members in self.fuse.items():
            if _matches(pattern, module):
                parent = module.rpartition(".")[0]
                return tuple(f"{parent}.{member}" for member in members)
        return (module,)


def _matches(pattern: str, name: str) -> bool:
    return _compiled(pattern).fullmatch(name) is not None


def _replace(pattern: str, replacement: str, name: str) -> str | None:
    """`name` rewritten when the pattern matches it whole, else None; wildcards are filled in order."""
    found = _compiled(pattern).fullmatch(name)
    if found is None:
        return None
    filled = iter(found.groups())
    pieces = [next(filled) if piece in ("*", "**") else piece for piece in replacement.split(".")]
    return ".".join(piece for piece in pieces if piece)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern over whole dotted segments as a regular expression."""
    out = ""
    segments = pattern.split(".")
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        if segment == "**":
            # The dot belongs to the wildcard, for `**` may stand for no segment at all.
            out += r"((?:[^.]+(?:\.[^.]+)*)?)" if last else r"(?:((?:[^.]+\.)*[^.]+)\.)?"
        else:
            out += (r"([^.]+)" if segment == "*" else re.escape(segment)) + ("" if last else r"\.")
    return re.compile(out)
