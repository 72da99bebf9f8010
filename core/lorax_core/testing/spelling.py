"""Other ways to write one configuration: without what is a default, and as files were written before.

Decides which there are, by asking the reference: a way counts where the reference's class makes the same configuration of it.
Knows nothing of how lorax-core reads one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lorax_core.testing.reference import quiet

Config = dict[str, Any]

_KEPT = ("model_type", "architectures")
# What says by whom a file was written or in which dtype its tensors are, and nothing of the model.
_ASIDE = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


class Spellings:
    """The ways to write `full`, a whole `config.json` of the reference; `aliases` are an architecture's own keys."""

    def __init__(self, config_class: Any, full: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
        self.full = dict(full)
        self._class = config_class
        self._aliases = aliases
        self._meant = self.read(full)

    def read(self, config: Mapping[str, Any]) -> Config | None:
        """The whole `config.json` that the reference makes of one, None where it refuses."""
        try:
            with quiet():
                # Deep: transformers writes into the rotary parameters that it is given.
                made = json.loads(self._class.from_dict(copy.deepcopy(dict(config))).to_json_string(use_diff=False))
        except Exception:  # whatever the reference raises: it takes no such file
            return None
        if isinstance(rope := made.get("rope_parameters"), dict) and "rope_type" in rope:
            rope.pop("type", None)  # it keeps the old name beside the new one
        stated = {key: value for key, value in self.full.items() if key in _KEPT}
        return {**{key: value for key, value in made.items() if key not in _ASIDE}, **stated}

    def is_same(self, config: Mapping[str, Any]) -> bool:
        """Whether the reference reads it as it reads `full`."""
        return self.read(config) == self._meant

    def without_one(self) -> Iterator[tuple[str, Config]]:
        """`full` without each of its keys, whatever the reference makes of that."""
        for key in self.full:
            if key not in _KEPT:
                yield key, {name: value for name, value in self.full.items() if name != key}

    def shortest(self) -> Config:
        """As few keys as the reference needs to read the same."""
        config = dict(self.full)
        for key in self.full:
            fewer = {name: value for name, value in config.items() if name != key}
            if key not in _KEPT and self.is_same(fewer):
                config = fewer
        return config

    def old(self) -> Config:
        """With older names wherever the reference takes them: `rope_theta`, `torch_dtype`, common names and own ones."""
        config = dict(self.full)
        for change in (_flat_rope, _old_rope_type, _old_dtype, _few_labels, self._own_names, self._common_names):
            changed = change(dict(config))
            # The rotary keys of some architectures are taken under their own names only.
            for candidate in (changed, self._own_names(dict(changed))):
                if self.is_same(candidate):
                    config = candidate
                    break
        return config

    def twice(self) -> Iterator[tuple[str, Config]]:
        """With a key under both of its names, of which one has another value: the one that the reference does not read."""
        for config in (self.full, self.old()):
            for own, common in self._aliases.items():
                value = config.get(own, config.get(common))
                for first, second in ((value, _another(value)), (_another(value), value)):
                    both = {**config, own: first, common: second}
                    if first != second and self.is_same(both):
                        yield f"with {own}={first!r} and {common}={second!r}", both

    def _own_names(self, config: Config) -> Config:
        return _renamed(config, {common: own for own, common in self._aliases.items()})

    def _common_names(self, config: Config) -> Config:
        return _renamed(config, {own: common for common, own in self._class.attribute_map.items()})


def _renamed(config: Config, names: Mapping[str, str]) -> Config:
    return {names.get(key, key): value for key, value in config.items()}


def _another(value: Any) -> Any:
    """A value that the key could have as well; the same where there is none."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2
        case str():
            return "relu" if value != "relu" else "gelu"
    return value


def _flat_rope(config: Config) -> Config:
    """Rotary parameters as transformers 4 wrote them: the base outside, a scaling in `rope_scaling` or null."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not all(isinstance(value, (int, float, str, bool)) for value in rope.values()):
        return config
    del config["rope_parameters"]
    rope = dict(rope)
    config |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    rope.pop("type", None)
    kind = rope.get("rope_type", "default")
    return {**config, "rope_scaling": None if kind == "default" else rope}


def _old_rope_type(config: Config) -> Config:
    """`type`, as it was called before `rope_type`."""
    scaling = config.get("rope_scaling")
    return {**config, "rope_scaling": _renamed(scaling, {"rope_type": "type"})} if scaling else config


def _old_dtype(config: Config) -> Config:
    return _renamed(config, {"dtype": "torch_dtype"})


def _few_labels(config: Config) -> Config:
    """Their number in place of their names."""
    names = config.pop("id2label", None)
    config.pop("label2id", None)
    return config if names is None else {**config, "num_labels": len(names)}
