"""The contract of a plugin, checked for every variant of the three types that this one brings."""

from __future__ import annotations

from lorax_core.testing import conformance

test_roberta = conformance("roberta")
test_xlm_roberta = conformance("xlm-roberta")
test_camembert = conformance("camembert")
