"""Adapters that were trained with a larger vocabulary than their base has.

Decides how many tokens an adapter adds, and whether its files hold a row for each of them in every table of the vocabulary. A
base that is shared has no rows for them; one that the adapter is merged into has.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorax_core.adapters.formats.peft import ModuleTensors, PeftFiles
from lorax_core.errors import AdapterError, listed
from lorax_core.modeling.embedding import Embedding
from lorax_core.weights.loader import LoadedModel

_HEAD = "lm_head"


def vocabulary_tables(base: LoadedModel) -> tuple[str, ...]:
    """Paths of the layers with a row for each token: the embedding, and the output head where there is one."""
    size = base.model.config.vocab_size
    sites = base.model.sites.items()
    tables = tuple(path for path, site in sites if isinstance(site, Embedding) and site.in_features == size)
    return (*tables, *([_HEAD] if _HEAD in base.model.sites else []))


def added_rows(files: PeftFiles, base: LoadedModel) -> int:
    """How many tokens an adapter has beyond the base's vocabulary; 0 for most."""
    larger = larger_tables(files, base)
    most = max((_rows(tensors, path) for path, tensors in larger.items()), default=0)
    return max(most - base.model.config.vocab_size, 0)


def larger_tables(files: PeftFiles, base: LoadedModel) -> dict[str, ModuleTensors]:
    """What an adapter holds of tables for more tokens than the base has, by path."""
    held = {base.weight_map.resolve_module(module).name: tensors for module, tensors in files.modules.items()}
    size = base.model.config.vocab_size
    return {path: held[path] for path in vocabulary_tables(base) if path in held and _rows(held[path], path) > size}


def refuse_added_rows(files: PeftFiles, base: LoadedModel) -> None:
    """Raises AdapterError for an adapter that adds tokens: the base has no rows for them."""
    added = added_rows(files, base)
    if added:
        size = base.model.config.vocab_size
        raise AdapterError(
            f"{files.path} adds {_tokens(added)} to the base's vocabulary of {size}: it is for {size + added} rows of "
            f"{listed(larger_tables(files, base))}, which a base that is shared does not have",
            hint="merge it, which makes the vocabulary larger: load(..., merge_adapter=SOURCE), or `lorax adapters merge "
            "SOURCE --base CHECKPOINT --out DIR`",
            http_hint="start the server with --merge-adapter SOURCE, which makes the vocabulary larger",
        )


def refuse_missing_rows(
    files: PeftFiles, base: LoadedModel, tables: Mapping[str, ModuleTensors], vocabulary: int
) -> None:
    """Raises AdapterError where the files do not hold all rows up to `vocabulary` of one of the `tables`, by path."""
    size = base.model.config.vocab_size
    lacking = [path for path, tensors in tables.items() if not holds_rows(tensors, size, vocabulary)]
    if lacking:
        raise AdapterError(
            f"{files.path} adds {_tokens(vocabulary - size)} to the base's vocabulary of {size}, and does not hold all rows "
            f"of {listed(lacking)}",
            hint="save it with save_pretrained(..., save_embedding_layers=True), or train both with modules_to_save",
        )


def holds_rows(tensors: ModuleTensors, size: int, vocabulary: int) -> bool:
    """Whether there is a row of a table for each token from `size` on up to `vocabulary`."""
    if tensors.weight is not None:
        return len(tensors.weight) == vocabulary
    # Counted: an id may be any number.
    return sum(size <= index < vocabulary for index in tensors.token_ids) == vocabulary - size


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _rows(tensors: ModuleTensors, path: str) -> int:
    """How many rows of a table the tensors are for; 0 where they do not say."""
    found = [0, *(index + 1 for index in tensors.token_ids)]
    found += [len(tensors.weight)] if tensors.weight is not None else []
    found += [tensors.embedding_a.shape[1]] if tensors.embedding_a is not None else []
    found += [len(tensors.b)] if tensors.b is not None and path == _HEAD else []
    return max(found)
