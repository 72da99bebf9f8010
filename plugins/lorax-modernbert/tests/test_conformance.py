"""The contract of a plugin, checked for every variant."""

from __future__ import annotations

from lorax_core.testing import conformance

test_conformance = conformance("modernbert")
