"""Ten defects, planted one at a time into a worker, that the campaigns have to find.

| name | what is wrong | campaign | found as |
| --- | --- | --- | --- |
| `names` | an adapter's name that cannot be a key is a bare exception | api | bare exception |
| `outside` | an index may name shards with `..` | index | accepted what must be refused |
| `hints` | a wrong setting of an adapter is refused without a next step | adapter | no hint |
| `rslora` | `use_rslora` is not read | adapter | wrong answer |
| `backtracking` | patterns of adapters are matched by Python's `re` | adapter | hang |
| `epsilon` | LayerNorm takes its own epsilon | config | wrong answer |
| `forgets` | an adapter that comes, or is refused, takes the others with it | adapter | engine broken after |
| `sizes` | the largest number of a configuration takes memory before it is checked | config | memory |
| `abort` | a tensor without dimensions ends the process | adapter | process died |
| `code` | the tokenizer of a checkpoint may be its own code | tokenizer | ran code of a checkpoint |
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from fuzz.verdicts import Finding


@dataclass(frozen=True)
class Plant:
    """A defect: `old` becomes `new` in the source of a function, and the campaign that finds it within so many cases."""

    function: str  # "module:qualified.name"
    old: str
    new: str
    campaign: str
    found_as: Finding
    within: int = 400
    quick: bool = False  # also in `make test`


PLANTS = {
    "names": Plant(
        "lorax_core.adapters.residency.names:NameTable.find", "if isinstance(name, str) else None", "if True else None", "api",
            Finding.BARE
    ),
    "outside": Plant(
        "lorax_core.untrusted:file_in", '".." in relative.parts', "False", "index", Finding.ACCEPTED, within=60, quick=True
    ),
    "hints": Plant("lorax_core.adapters.formats.settings:read_settings", "hint=\"write it as PEFT's save_pretrained does\"",
        "hint=None", "adapter", Finding.NO_HINT, within=100, quick=True),
    "rslora": Plant("lorax_core.adapters.formats.settings:PeftSettings.scale", "if self.use_rslora", "if False", "adapter",
        Finding.WRONG, within=150, quick=True),
    "backtracking": Plant("lorax_core.patterns:UntrustedPattern.__init__", "re2.compile(expression, options=_OPTIONS)",
        '__import__("re").compile(expression)', "adapter", Finding.HANG),
    "epsilon": Plant("lorax_core.modeling.norm:LayerNorm.compute", "self.eps", "1e-5", "config", Finding.WRONG, quick=True),
    "forgets": Plant("lorax_core.adapters.residency.store:AdapterStore._load", "handle = self._read(found, request)",
        "[self.unload(one) for one in tuple(self)]; handle = self._read(found, request)", "adapter",
        Finding.BROKEN, within=100),
    "sizes": Plant("lorax_core.weights.checkpoint:Checkpoint._refuse_quantised",
        'quantisation = self.config.get("quantization_config")',
        "n = max((n for n in self.config.values() if type(n) is int), default=0); bytearray(2**10 * min(abs(n), 2 * 10**6)); "
        'quantisation = self.config.get("quantization_config")', "config", Finding.MEMORY),
    "abort": Plant("lorax_core.adapters.formats.tensors:_shapes", "if min(shape, default=0) < 0",
        'if shape == () and __import__("os").abort() or min(shape, default=0) < 0', "adapter", Finding.DIED),
    "code": Plant("lorax_core.serving.tokenizer:load_tokenizer", "trust_remote_code=False",
        "trust_remote_code=True", "tokenizer",
        Finding.CODE),
}  # fmt: skip


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The defect of this name, while the block runs; nothing for an empty name."""
    if not name:
        yield
        return
    plant = PLANTS[name]
    function = _function(plant.function)
    before = function.__code__
    function.__code__ = _rewritten(function, plant).__code__
    try:
        yield
    finally:
        function.__code__ = before


def _function(path: str) -> FunctionType:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for step in name.split("."):
        found = getattr(found, step)
    return found


def _rewritten(function: FunctionType, plant: Plant) -> Callable[..., Any]:
    source = textwrap.dedent(inspect.getsource(function))
    assert plant.old in source, f"{plant.function} has no {plant.old!r}: plant this defect again"
    made: dict[str, Any] = {}
    # super() and closures would need the cells of the original; the functions chosen have none.
    assert not function.__code__.co_freevars
    exec(
        compile("from __future__ import annotations\n" + source.replace(plant.old, plant.new), "planted", "exec"),
        function.__globals__,
        made,
    )
    found: Callable[..., Any] = made[function.__name__]
    return found
