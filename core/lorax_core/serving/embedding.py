"""How a loaded model makes vectors.

Decides between what the checkpoint's files say and what the user asked for instead.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from lorax_core.errors import CheckpointError
from lorax_core.modeling.activation import get_activation
from lorax_core.modeling.heads import EmbeddingHead, Projection
from lorax_core.types import Pooling, Task
from lorax_core.weights.loader import LoadedModel
from lorax_core.weights.sentence import SentenceFiles, dense_folder, read_dense, read_sentence_files


def set_up_embedding(
    base: LoadedModel, pooling: str | None, normalize: bool | None, dim: int | None
) -> SentenceFiles | None:
    """Set pooling, normalisation and projections of the embedding head, when there is one; gives the files that were read.

    Raises CheckpointError for files that cannot be followed.
    """
    model = base.model
    if Task.EMBED not in model.tasks:
        return None
    # The user's pooling goes in too: the files may name one that is not supported.
    files = read_sentence_files(base.checkpoint, Pooling(pooling) if pooling is not None else None)
    head = cast("EmbeddingHead", model.head(Task.EMBED))
    if pooling is not None:
        head.pooling = Pooling(pooling)
    elif files is not None:
        head.pooling = files.pooling
    elif dim is not None:
        head.pooling = Pooling.MEAN  # what checkpoints with dense layers of several lengths were trained with
    else:
        # A causal model's first row knows only itself; its last one has seen the text.
        head.pooling = Pooling.LAST if model.needs_kv_cache else Pooling.CLS
    head.normalize = normalize if normalize is not None else files is not None and files.normalize
    _set_projections(base, head, files, dim)
    return files


def shaped(values: NDArray[np.float32], dimensions: int | None, *, scale: bool) -> NDArray[np.float32]:
    """Values `[..., dim]` to the first `dimensions` of them, then to unit length where they are to be scaled."""
    values = values[..., :dimensions]
    # As torch's normalize, which keeps a vector of zeros as it is.
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12) if scale else values


def _set_projections(base: LoadedModel, head: EmbeddingHead, files: SentenceFiles | None, dim: int | None) -> None:
    if dim is not None:
        layers = [read_dense(base.checkpoint, dense_folder(base.checkpoint, dim))]
    else:
        layers = list(files.dense) if files is not None else []
    device = base.model.device
    for layer in layers:
        # [out, in]. `head.dim` grows with each projection that is added, so this checks the chain.
        if layer.weight.shape[1] != head.dim:
            raise CheckpointError(
                f"a dense layer of {base.checkpoint.path} takes vectors of {layer.weight.shape[1]}, not of {head.dim}",
                hint="its folder and 1_Pooling/config.json belong to another model: download or copy the checkpoint again",
            )
        bias = layer.bias.to(device) if layer.bias is not None else None
        head.projections.append(Projection(layer.weight.to(device), bias, get_activation(layer.activation)))
