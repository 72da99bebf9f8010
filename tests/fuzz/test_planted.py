"""The campaigns find what is planted: the quick ones here, all ten in `make fuzz`."""

from __future__ import annotations

import pytest

from fuzz.bases import build
from fuzz.planted import PLANTS, planted
from fuzz.search import find_plant
from lorax_core.modeling import LayerNorm


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder of bases, and the worker of the plant before: starting one takes seconds."""
    made = {"root": build(tmp_path_factory.mktemp("bases")), "worker": None}
    yield made
    if made["worker"] is not None:
        made["worker"].close()


@pytest.mark.parametrize("name", [name for name, plant in PLANTS.items() if plant.quick])
def test_a_planted_defect_is_found(bench, name):
    verdict, bench["worker"] = find_plant(name, bench["root"], bench["worker"])

    assert verdict is not None, f"{name} was not found within {PLANTS[name].within} cases"


def test_there_are_ten_defects():
    assert len(PLANTS) == 10
    assert len({plant.found_as for plant in PLANTS.values()}) > 7


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_a_defect_is_planted_for_a_while_only(name):
    before = LayerNorm.compute.__code__

    with planted(name):
        pass

    assert LayerNorm.compute.__code__ is before
