"""How the tensor names of a checkpoint become the parameters of a model.

Decides names and the order of rows: prefixes, renames, fusions, transposes, interleaves, ties and what is ignored, matched
on whole dotted segments. Knows nothing of files. Each architecture declares its own map; no central table knows them all.

In a pattern `*` stands for one segment and `**` for any number, also none; both are carried over to the replacement in
order. `layers.*.attn.bias` therefore never means `layers.0.c_attn.bias`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint tensor goes: a parameter's canonical name, and for a fused layer which of its parts it is.

    `transpose`: it is stored `[in, out]`. `interleave`: its rows are stored `(groups, members, ..)` and go to
    `(members, groups, ..)`.
    """

    name: str
    part: int | None = None
    transpose: bool = False
    interleave: tuple[int, int] | None = None

    def arranged(self, tensor: Tensor) -> Tensor:
        """A stored tensor `[out, ...]` (or `[in, out]`) as the layer wants it."""
        if self.transpose:
            tensor = tensor.t()
        if self.interleave is None or tensor.shape[0] % (self.interleave[0] * self.interleave[1]):
            return tensor
        groups, members = self.interleave
        rows = tensor.reshape(groups, members, -1, *tensor.shape[1:])  # [groups, members, n, ...]
        return rows.transpose(0, 1).reshape(tensor.shape)


@dataclass(frozen=True)
class WeightMap:
    """The declarative map of one architecture. Every field is optional.

    - `prefixes`: leading segments that some checkpoints carry and others do not (`model`, `bert`).
    - `rename`: pattern to replacement, the first match wins (`{"**.gamma": "**.weight"}`).
    - `fuse`: a fused module to the names of its members beside it, in the layer's order
      (`{"layers.*.self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj")}`).
    - `transpose`: patterns of tensors stored `[in, out]`.
    - `interleave`: a module whose output rows are stored group by group, to `(groups, members)`; its rows are brought to
      member by member (NeoX stores q, k, v of each head side by side: `(heads, 3)`).
    - `tie`: parameter to the parameter whose numbers it shares when the checkpoint has none of its own.
    - `ignore`: patterns of tensors that inference does not need, unless a head takes them.
    """

    prefixes: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    fuse: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transpose: tuple[str, ...] = ()
    interleave: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tie: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def resolve(self, name: str) -> Target:
        """The target of a checkpoint tensor. Does not ask whether the target exists."""
        name = self.canonical(name)
        module, _, leaf = name.rpartition(".")
        transpose = any(_matches(pattern, name) for pattern in self.transpose)
        target = self.resolve_module(module)
        return Target(f"{target.name}.{leaf}" if module else leaf, target.part, transpose, target.interleave)

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint tensor that no parameter takes is known not to matter."""
        # Patterns are of canonical names, so one serves files with and without the prefix.
        return any(_matches(pattern, self.canonical(name)) for pattern in self.ignore)

    def resolve_module(self, module: str) -> Target:
        """The target of a module's name as checkpoints or adapters give it."""
        module = self.canonical(module)
        for pattern, members in self.fuse.items():
            parent, _, fused = pattern.rpartition(".")
            for part, member in enumerate(members):
                replaced = _replace(f"{parent}.{member}", f"{parent}.{fused}", module)
                if replaced is not None:
                    return Target(replaced, part)
        groups = next((shape for pattern, shape in self.interleave.items() if _matches(pattern, module)), None)
        return Target(module, interleave=groups)

    def canonical(self, name: str) -> str:
        """The name without a known prefix and under its current spelling."""
        for prefix in self.prefixes:
            if name.startswith(prefix + "."):
                name = name[len(prefix) + 1 :]
                # At most one prefix is taken off: what remains may begin with a module of that name.
                break
        for pattern, replacement in self.rename.items():
            replaced = _replace(pattern, replacement, name)
            if replaced is not None:
                return replaced
        return name

    def stored_name(self, name: str) -> str:
        """The spelling of a canonical name in checkpoints, without a prefix; of several spellings, the last of `rename`."""
        # Reversed, as maps list old spellings (gamma, beta) first and the current one last.
        spellings = (_replace(new, old, name) for old, new in reversed(tuple(self.rename.items())))
        return next((spelling for spelling in spellings if spelling is not None), name)

    def members(self, module: str) -> tuple[str, ...]:
        """The checkpoint's names for a module of the model: its members when it is fused, else itself."""
        for pattern, members in self.fuse.items():
            if _matches(pattern, module):
                parent = module.rpartition(".")[0]
                return tuple(f"{parent}.{member}" for member in members)
        return (module,)


def post_norm_map(prefix: str, *ignored: str) -> WeightMap:
    """The map of an encoder with BERT's names, with or without a `prefix`, old names of norms too.

    `ignored` are patterns of heads that the architecture's checkpoints may hold and that are not supported.
    """
    stored = "encoder.layer.*"
    norms = {
        "embeddings.LayerNorm": "embeddings.LayerNorm",
        f"{stored}.attention.output.LayerNorm": "layers.*.post_attention_layernorm",
        f"{stored}.output.LayerNorm": "layers.*.post_mlp_layernorm",
    }
    return WeightMap(
        prefixes=(prefix,),
        rename={
            # Files converted from TensorFlow. Before the `**` patterns, which would match them too: the first match wins.
            **{f"{old}.gamma": f"{new}.weight" for old, new in norms.items()},
            **{f"{old}.beta": f"{new}.bias" for old, new in norms.items()},
            **{f"{old}.**": f"{new}.**" for old, new in norms.items()},
            f"{stored}.attention.self.**": "layers.*.self_attn.**",
            f"{stored}.attention.output.dense.**": "layers.*.self_attn.o_proj.**",
            f"{stored}.intermediate.dense.**": "layers.*.mlp.up_proj.**",
            f"{stored}.output.dense.**": "layers.*.mlp.down_proj.**",
        },
        fuse={"layers.*.self_attn.qkv_proj": ("query", "key", "value")},
        # Position numbers are stored by old checkpoints, the pooler by those that were saved without a head.
        ignore=("embeddings.position_ids", "pooler.**", *ignored),
    )


def _matches(pattern: str, name: str) -> bool:
    # The dot in front lets every segment, the first one included, be matched as `\.name`.
    return _compiled(pattern).fullmatch(f".{name}") is not None


def _replace(pattern: str, replacement: str, name: str) -> str | None:
    """`name` rewritten when the pattern matches it whole, else None; wildcards are filled in order."""
    found = _compiled(pattern).fullmatch(f".{name}")
    if found is None:
        return None
    # `**` may have matched nothing: its piece is then empty, and left out below.
    filled = iter(found.groups())
    pieces = [next(filled).lstrip(".") if piece in ("*", "**") else piece for piece in replacement.split(".")]
    return ".".join(piece for piece in pieces if piece)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A pattern over whole segments, each with a dot in front, as a regular expression."""
    # The group of `**` holds its dots, so that it can be empty; `*` needs exactly one segment.
    wildcards = {"*": r"(\.[^.]+)", "**": r"((?:\.[^.]+)*)"}
    return re.compile("".join(wildcards.get(segment, rf"\.{re.escape(segment)}") for segment in pattern.split(".")))
