"""Memory of a loaded model: each number is held once."""

from __future__ import annotations

import gc

import pytest
import torch
from builders import make_bert, make_qwen2
from rigs import make_loaded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from lorax_core.kernels import onednn
from lorax_core.linear_methods.base import LinearKernel
from lorax_core.linear_methods.select import LinearPolicy
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


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators make."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0
        self._known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def known(tensor):
            self._known[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        tree_map_only(torch.Tensor, known, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.set_.source_Storage:  # a tensor of a mapped file: its pages are the file's
            known(out)
        for tensor in tree_flatten(out)[0]:
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage().data_ptr() not in self._known:
                self.nbytes += known(tensor).untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("make", [make_qwen2, make_bert])
def test_weights_go_to_their_place_without_a_second_copy(make, tmp_path, host):
    folder = make(tmp_path)  # float32, so that each number is converted on its way

    with Allocations() as made:
        model = make_loaded(folder, host, dtype=torch.bfloat16, linear_policy=LinearPolicy({"*": "plain"})).model

    # The weights themselves, and what each tensor needs to be looked at: its smallest and its largest number.
    weights = held_bytes(model)
    assert weights <= made.nbytes < weights + 4096


def prepared_bytes(model):
    sites = [module for module in model.modules() if isinstance(module, PreparedSite) and module.is_prepared]
    kernels = {site.kernel.weight.data.data_ptr(): site.kernel.nbytes for site in sites}
    return sum(kernels.values()) + sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_laid_out_anew_share_the_memory_that_they_are_read_into(dtype, tmp_path, host):
    folder = make_qwen2(tmp_path, vocab_size=2048, num_hidden_layers=4, tie_word_embeddings=True)
    load(folder, host, dtype)  # once before: what is tried is tried now

    with Allocations() as made:
        model = load(folder, host, dtype)

    largest = 2048 * 64 * dtype.itemsize
    assert made.nbytes < prepared_bytes(model) + largest + 50_000


def load(folder, host, dtype):
    return make_loaded(folder, host, dtype=dtype, linear_policy=LinearPolicy(quantize="int8")).model
