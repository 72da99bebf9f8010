"""Memory of a loaded model: each number is held once."""

from __future__ import annotations

import gc

import pytest
import torch
from builders import make_qwen2
from rigs import make_loaded

from lorax_core.kernels import onednn
from lorax_core.linear_methods.base import LinearKernel
from lorax_core.modeling.prepared import PreparedSite


def held_bytes(model):
    """Bytes of all parameters, buffers and prepared weights, each storage once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    packed = {}
    for module in model.modules():
        if isinstance(module, PreparedSite) and module.is_prepared:
            kernel: LinearKernel = module.kernel
            dense = getattr(kernel, "weight", None)
            if dense is not None:
                storages[dense.untyped_storage().data_ptr()] = dense.untyped_storage().nbytes()
            else:
                packed[id(kernel.packed)] = kernel.nbytes
    return sum(storages.values()) + sum(packed.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_holds_its_weights_once(dtype, tmp_path, host):
    if not onednn.works(dtype):
        pytest.skip("this build of torch packs nothing of this dtype, so nothing could be held twice")
    folder = make_qwen2(tmp_path, vocab_size=4096, tie_word_embeddings=True)

    model = make_loaded(folder, host, dtype=dtype).model

    gc.collect()
    numbers = sum(site.dense_weight().numel() for path, site in model.sites.items() if path != "lm_head")
    assert held_bytes(model) < 1.15 * numbers * dtype.itemsize
    assert model.sites["lm_head"].kernel.method == "onednn"
