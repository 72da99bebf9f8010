from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lorax_core.weights.mapping import Target, WeightMap

# Segments that begin and end like each other: whatever compares parts of segments will fall for them.
SEGMENTS = st.sampled_from(["a", "b", "ab", "aa", "0", "10"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5)
PATTERNS = st.lists(SEGMENTS | st.sampled_from(["*", "**"]), min_size=1, max_size=5)


def matches(pattern: list[str], name: list[str]) -> bool:
    """The oracle: patterns as their documentation says, one segment at a time."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(matches(pattern[1:], name[taken:]) for taken in range(len(name) + 1))
    return bool(name) and pattern[0] in ("*", name[0]) and matches(pattern[1:], name[1:])


@given(PATTERNS, NAMES)
@example(["**", "bias"], ["bias"])
@example(["layers", "*", "attn", "bias"], ["layers", "0", "c_attn", "bias"])
@example(["a", "**", "**"], ["a"])
def test_a_pattern_matches_whole_segments_only(pattern, name):
    weights = WeightMap(ignore=(".".join(pattern),))

    assert weights.ignores(".".join(name)) is matches(pattern, name)


@given(PATTERNS, NAMES)
def test_wildcards_are_carried_over_in_order(pattern, name):
    weights = WeightMap(rename={".".join(pattern): ".".join(pattern)})

    assert weights.canonical(".".join(name)) == ".".join(name)


@pytest.mark.parametrize(
    ("pattern", "replacement", "name", "renamed"),
    [
        ("**.gamma", "**.weight", "a.b.gamma", "a.b.weight"),
        ("**.gamma", "**.weight", "gamma", "weight"),
        ("h.*.**", "layers.*.**", "h.3.attn.bias", "layers.3.attn.bias"),
        ("h.*.**", "layers.*.**", "h.3", "layers.3"),
        ("a.*.b.*", "*.*", "a.x.b.y", "x.y"),
        ("h.*.attn", "x", "h.3.attn.bias", "h.3.attn.bias"),
        ("h.1", "x", "h.10", "h.10"),
        ("a.b", "x", "a-b", "a-b"),
    ],
)
def test_a_tensor_is_renamed_when_the_whole_pattern_fits(pattern, replacement, name, renamed):
    assert WeightMap(rename={pattern: replacement}).canonical(name) == renamed


def test_the_first_rename_that_fits_wins():
    weights = WeightMap(rename={"a.*": "first.*", "**": "second.**"})

    assert weights.canonical("a.b") == "first.b"
    assert weights.canonical("b.b") == "second.b.b"


@given(NAMES)
def test_a_known_prefix_may_stand_in_front_or_not(name):
    weights = WeightMap(prefixes=("model", "bert"))
    plain = ".".join(name)

    assert (
        weights.canonical(f"model.{plain}") == weights.canonical(f"bert.{plain}") == weights.canonical(plain) == plain
    )


@pytest.mark.parametrize("name", ["models.a", "mode.l.a", "modela", "a.model.b"])
def test_a_prefix_is_a_whole_segment_in_front(name):
    assert WeightMap(prefixes=("model",)).canonical(name) == name


FUSED = WeightMap(
    prefixes=("model",),
    fuse={"layers.*.attn.qkv": ("q", "k", "v"), "layers.*.mlp.gate_up": ("gate", "up"), "**.both": ("one", "other")},
)


@given(st.integers(0, 99), st.sampled_from(["attn.qkv", "mlp.gate_up", "deep.in.both"]))
def test_members_of_a_fused_layer_resolve_back_to_its_parts(layer, fused):
    module = f"layers.{layer}.{fused}"

    members = FUSED.members(module)

    assert len(members) >= 2
    assert [FUSED.resolve_module(member) for member in members] == [
        Target(module, part) for part in range(len(members))
    ]
    assert [FUSED.resolve(f"model.{member}.weight") for member in members] == [
        Target(f"{module}.weight", part) for part in range(len(members))
    ]


@given(NAMES)
def test_a_layer_that_is_not_fused_is_its_own_only_member(name):
    module = ".".join(name)

    assert FUSED.members(module) == (module,)
    assert FUSED.resolve_module(module) == Target(module)


@pytest.mark.parametrize("name", ["layers.0.attn.qq", "layers.0.attn.q.extra", "layers.0.cross_attn.q", "layers.0.q"])
def test_a_name_like_a_members_is_no_member(name):
    assert FUSED.resolve_module(name) == Target(name)


def test_a_tensor_outside_of_any_module_keeps_its_name():
    assert FUSED.resolve("scale") == Target("scale")


@pytest.mark.parametrize(
    ("name", "flipped"), [("h.0.c_attn.weight", True), ("h.0.c_attn.bias", False), ("h.0.c_fc.weight", False)]
)
def test_tensors_stored_the_other_way_round_are_marked(name, flipped):
    weights = WeightMap(prefixes=("transformer",), transpose=("h.*.c_attn.weight",))

    target = weights.resolve(f"transformer.{name}")

    assert target.transpose is flipped
    stored = torch.arange(6.0).view(2, 3)
    assert torch.equal(target.arranged(stored), stored.t() if flipped else stored)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_interleaved_rows_are_brought_member_by_member(groups, members, rows):
    weights = WeightMap(interleave={"h.*.qkv": (groups, members)})
    # Row r of member m of group g says so.
    stored = torch.tensor([[g, m, r] for g in range(groups) for m in range(members) for r in range(rows)])

    arranged = weights.resolve("h.0.qkv.weight").arranged(stored)

    assert arranged.tolist() == [[g, m, r] for m in range(members) for g in range(groups) for r in range(rows)]
    assert weights.resolve("h.0.qkv.bias").arranged(stored[:, 0]).tolist() == arranged[:, 0].tolist()


@given(PATTERNS, NAMES)
def test_what_is_ignored_under_a_prefix_is_ignored_without_it(pattern, name):
    assume(name[0] != "model")
    weights = WeightMap(prefixes=("model",), ignore=(".".join(pattern),))

    assert weights.ignores(".".join(name)) == weights.ignores(".".join(["model", *name]))


def test_a_canonical_name_is_spelt_as_checkpoints_spell_it_now():
    weights = WeightMap(
        rename={"h.*.ln.gamma": "layers.*.norm.weight", "h.*.ln.**": "layers.*.norm.**", "wte.**": "embed_tokens.**"}
    )

    assert weights.stored_name("layers.3.norm.weight") == "h.3.ln.weight"
    assert weights.stored_name("embed_tokens.weight") == "wte.weight"
    assert weights.stored_name("lm_head.weight") == "lm_head.weight"
