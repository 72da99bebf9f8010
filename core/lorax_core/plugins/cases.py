"""What the conformance kit needs to test an architecture: a tiny configuration, variants, references.

Decides which cases are valid data. Knows nothing of the checks. A plugin's `cases.py` is imported by the kit alone, so listing
and loading models never pay for it.
"""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from lorax_core.plugins.spec import ClassPath, JsonObject, Key, Line
from lorax_core.types import Task

HEAD_SIZES: Final = (32, 64, 80, 96, 128)
"""Sizes of heads that all are tested with: powers of two and sizes between them; kernels have a path of their own for some."""


class ArchitectureCases(BaseModel):
    """The tiny checkpoints of one architecture, and the classes that they are compared with.

    A plugin makes one in its `cases.py`; the `cases` of its `ArchitectureSpec` names it. Building one raises
    `pydantic.ValidationError` for a field that is missing, misspelt or invalid. Like `plugin.py`, it never imports torch.

    - `tiny_config`: a `config.json` with fewer than a million parameters, spelt as the reference spells it. Its
      `initializer_range` (0.2 unless stated) is the deviation of the random numbers in the checkpoints.
    - `variants`: named changes to it, one for each decision that the code makes.
    - `references`: by task, the class that computes the same independently, such as `"transformers:GPT2LMHeadModel"`.
    - `known_failures`: `{check: reason}` or `{"check[variant]": reason}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tiny_config: JsonObject
    variants: dict[Key, JsonObject] = {}
    references: dict[Task, ClassPath]
    known_failures: dict[str, Line] = {}

    def config(self, variant: str) -> dict[str, object]:
        """The `config.json` of a variant; that of an unknown one (such as the base) is `tiny_config` itself."""
        return {**self.tiny_config, **self.variants.get(variant, {})}
