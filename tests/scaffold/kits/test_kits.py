"""Packages as the command writes them pass the whole conformance kit, without an edit. `make test-scaffold` runs these."""

from __future__ import annotations

import pytest
import torch

from lorax_core.scaffold.check import check_package
from lorax_core.scaffold.package import make_package

torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["Starcoder2", "Phi", "Olmo", "Olmo2", "OPT"])
def test_a_package_passes_the_kit_as_it_was_written(name, tmp_path):
    package = make_package(f"lorax-{name.lower()}", f"transformers:{name}ForCausalLM")
    package.write(tmp_path / "made")

    report = check_package(package, tmp_path / "made")

    assert report.failures == ()
    assert report.ok
    assert report.counts["passed"] > 200
