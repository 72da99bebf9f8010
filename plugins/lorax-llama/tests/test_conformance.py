"""The contract of a plugin, checked for every variant of the two types that this one brings."""

from __future__ import annotations

from lorax_core.testing import conformance

test_llama = conformance("llama")
test_mistral = conformance("mistral")
