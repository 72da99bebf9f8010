"""The packages that these tests run over are the versions that the project names. Their private parts are doubled, so another
version may pass or fail for no reason of ours.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


@pytest.mark.parametrize("name", ["flashinfer-python", "flash-attn", "triton", "apache-tvm-ffi"])
def test_the_version_is_the_pinned_one(name: str):
    assert f"{name}=={version(name)}" in CONSTRAINTS.read_text("utf-8").splitlines()
