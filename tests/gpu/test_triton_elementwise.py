from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu.doubles.triton_driver import pretend_gpu
from gpu.kernel_checks import (
    DTYPES,
    check_far_slots,
    check_gate,
    check_no_slot,
    check_norms,
    check_rotation,
    drawn,
    fenced,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lorax_core.attention.base import CacheRows, HostAndDevice, StepAttention
from lorax_core.kernels.elementwise import READABLE, Angles
from lorax_core.kernels.triton.elementwise import TritonElementwise
from lorax_core.modeling import DecoderLayer, GatedMLP, RMSNorm, Rope, RotaryAttention, RotaryEmbedding
from lorax_core.modeling.activation import ACTIVATIONS, get_activation
from lorax_core.modeling.batch import Batch
from lorax_core.modeling.norm import Norm


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def gpu(request):
    with pretend_gpu(request.param) as made:
        yield made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 100, 896, 4096])
def test_norms_round_where_the_readable_form_does(gpu, dtype, width):
    check_norms(dtype, width, rows=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "half"),
    [(14, 2, 64, 32), (4, 4, 80, 10), (3, 1, 6, 3), (40, 8, 128, 64), (4, 2, 64, 0)],
    ids=["qwen2", "a part of each head", "sizes of no power", "groups of heads", "no angles"],
)
def test_rotation_and_storage_are_those_of_the_readable_form_to_the_bit(gpu, dtype, heads, kv_heads, dim, half):
    check_rotation(dtype, heads, kv_heads, dim, half)


def test_rows_without_a_slot_are_stored_nowhere(gpu):
    check_no_slot()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "relu"])
def test_gates_are_those_of_the_readable_form(gpu, dtype, act):
    check_gate(dtype, act)


def test_slots_past_two_to_the_31_numbers_are_found(gpu):
    check_far_slots()


def test_what_is_no_number_stays_none(gpu):
    x = torch.tensor([[float("nan"), 1.0, -500.0, 500.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16)

    for name in ("silu", "gelu", "gelu_new", "relu"):
        found = TritonElementwise().gated_act(x, get_activation(name))
        assert found.isnan().tolist() == [[True, False, False, False]], name


# --- what the kernels leave to the readable form ---


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"linear"}))
def test_every_activation_is_computed_by_one_form_or_the_other(name):
    x = drawn(2, 16, dtype=torch.bfloat16)
    act = get_activation(name)
    with pretend_gpu(90) as gpu:
        found = TritonElementwise().gated_act(x, act)

    torch.testing.assert_close(found, READABLE.gated_act(x, act), rtol=1e-2, atol=1e-3)
    assert bool(gpu.launches) == (act.name in ("silu", "gelu", "gelu_tanh", "relu"))


def test_shapes_and_dtypes_that_no_kernel_takes_are_computed_readably(gpu):
    kernels = TritonElementwise()
    x, wide = drawn(2, 16, dtype=torch.float64), drawn(2, 20000, dtype=torch.bfloat16)
    columns = drawn(16, 4, dtype=torch.bfloat16).t()
    rows = drawn(2, 2, 8, dtype=torch.bfloat16)
    strided = torch.zeros(4, 2, 2, 8, dtype=torch.bfloat16).transpose(0, 1)[:, :2]  # pages that do not lie end to end

    assert torch.equal(kernels.rms_norm(x, x[0], 1e-6), READABLE.rms_norm(x, x[0], 1e-6))
    assert torch.equal(kernels.rms_norm(wide, wide[0], 1e-6), READABLE.rms_norm(wide, wide[0], 1e-6))
    assert torch.equal(kernels.gated_act(columns, F.silu), READABLE.gated_act(columns, F.silu))
    assert torch.equal(kernels.layer_norm(x, None, None, 1e-5), READABLE.layer_norm(x, None, None, 1e-5))
    nothing = Angles(*torch.zeros(2, 2, 1, 0, dtype=torch.bfloat16))
    assert torch.equal(kernels.rotate(rows, rows, nothing)[0], rows)
    with pytest.raises(RuntimeError, match="view"):
        kernels.rotate_and_store(rows, rows, rows, None, strided, strided, torch.tensor([0, 1]))
    assert gpu.launches == []


@pytest.mark.parametrize(("name", "rest"), [("add_rms_norm", (1e-6,)), ("add_layer_norm", (None, 1e-5))])
def test_a_residual_of_one_row_for_all_is_not_read_past_its_end(gpu, name, rest):
    x, residual, weight = (fenced(drawn(rows, 16, dtype=torch.bfloat16)) for rows in (3, 1, 1))

    normed, total = getattr(TritonElementwise(), name)(x, residual, weight[0], *rest)

    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, getattr(READABLE, name)(x, residual, weight[0], *rest)[0])


def test_no_rows_are_no_numbers(gpu):
    kernels = TritonElementwise()
    x, heads = torch.zeros(0, 32, dtype=torch.bfloat16), torch.zeros(0, 2, 8, dtype=torch.bfloat16)

    assert kernels.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), 1e-6).shape == (0, 32)
    assert kernels.gated_act(x, get_activation("silu")).shape == (0, 16)
    assert kernels.rotate(heads, heads, Angles(*torch.zeros(2, 0, 1, 4, dtype=torch.bfloat16)))[0].shape == (0, 2, 8)


def test_nothing_is_compiled_when_the_number_of_rows_changes(gpu):
    def run(rows):
        check_norms(rows=rows)
        check_gate(rows=rows)
        check_rotation(rows=rows)

    run(3)
    gpu.compiled.clear()
    for rows in (1, 2, 16, 17):
        run(rows)

    assert gpu.compiled == []


# --- a whole layer ---

VIEWS = "view split slice select t transpose unsqueeze alias detach expand reshape split_with_sizes as_strided unbind"
NOT_LAUNCHED = {*VIEWS.split(), "_unsafe_view", "empty", "new_empty"}


class Operators(TorchDispatchMode):
    """Counts operators that would be launches on a GPU: all but those that only make views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NOT_LAUNCHED:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class OneLaunch(StepAttention):
    """Attention that is one operator, as on a GPU."""

    def __init__(self, cache, slots) -> None:
        self.cache, self.slots = cache, slots

    def cache_rows(self, layer):
        return CacheRows(*self.cache, self.slots)

    def write(self, layer, k, v):
        raise AssertionError("stored by rotate_and_store")

    def attend(self, layer, q):
        return q.sigmoid()

    encode = write


def make_layer(kernels):
    generator = torch.Generator().manual_seed(0)
    rotary = RotaryEmbedding(16, Rope(original_length=64))
    attention = RotaryAttention(64, 4, 2, 16, rotary=rotary, causal=True, out_bias=False)
    layer = DecoderLayer(attention, GatedMLP(64, 96, "silu"), lambda: RMSNorm(64, 1e-6)).bfloat16()
    rotary.reset_buffers()
    for tensor in layer.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 8)
    for module in (attention.attention, layer.mlp, *(m for m in layer.modules() if isinstance(m, Norm))):
        module.elementwise = kernels
    return layer, rotary


def make_batch(rotary):
    ids = torch.arange(3)
    starts = torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    batch = Batch(ids, 7 * ids, ids, HostAndDevice(starts, starts), HostAndDevice(starts[1:], starts[1:]))
    cache = torch.zeros(2, 2, 4, 2, 16, dtype=torch.bfloat16)
    batch.attention = OneLaunch(cache, torch.tensor([4, 5, 6]))
    batch.angles(rotary, torch.bfloat16)  # once a step, for all layers
    return batch, cache


def test_a_layer_of_qwen2_takes_ten_launches():
    counts = {}
    for kernels in (READABLE, TritonElementwise()):
        layer, rotary = make_layer(kernels)
        batch, _ = make_batch(rotary)
        x = drawn(3, 64, dtype=torch.bfloat16)
        # Not computed: the interpreter's own operators would be counted.
        with pretend_gpu(90, computes=False) as gpu, Operators() as operators:
            layer(x, batch)
        counts[kernels.name] = operators.names, gpu.launches

    readable, none = counts["torch"]
    others, ours = counts["triton"]
    assert none == []
    assert len(readable) > 35, readable
    # The products are torch's, and attention and the last sum.
    assert sorted(others) == ["add", "addmm", "mm", "mm", "mm", "sigmoid"]
    assert ours == ["normalise_rows", "turn_rows", "normalise_rows", "gate_rows"]


def test_a_layer_of_qwen2_gives_the_numbers_of_the_readable_form(gpu):
    found = []
    for kernels in (READABLE, TritonElementwise()):
        layer, rotary = make_layer(kernels)
        batch, cache = make_batch(rotary)
        found.append((layer(drawn(3, 64, dtype=torch.bfloat16), batch), cache))

    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
