"""Core's own plugin: the attention backends of lorax-core, declared through the same hook as any plugin's."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_core.plugins.hookspecs import hookimpl
from lorax_core.plugins.spec import BackendSpec


@hookimpl
def lorax_attention_backends() -> Iterable[BackendSpec]:
    """Two backends for GPUs, one for CPUs, and the reference in plain torch, which runs everywhere that torch runs."""
    yield BackendSpec(
        name="flashinfer",
        summary="FlashInfer: paged attention in 16 bit, also over an fp8 cache; heads of 64, 128 or 256.",
        backend="lorax_core.attention.flashinfer:FlashInferBackend",
        device_types=("cuda",),
        priority=20,
    )
    yield BackendSpec(
        name="flash_attn",
        summary="FlashAttention 2 in 16 bit, from flash-attn or from torch itself; heads of any multiple of 8 up to 256.",
        backend="lorax_core.attention.flash_attn:FlashAttnBackend",
        device_types=("cuda",),
        priority=10,
    )
    yield BackendSpec(
        name="native",
        summary="Paged attention in C++ for causal models on a CPU, compiled at its first use.",
        backend="lorax_core.attention.native:NativeBackend",
        device_types=("cpu",),
        priority=10,
    )
    yield BackendSpec(
        name="torch",
        summary="Reference in plain torch; the oracle of every other backend.",
        backend="lorax_core.attention.torch:TorchBackend",
        device_types=("cpu", "cuda"),
        # The lowest of all, so any plugin's backend that supports the model is tried before it.
        priority=0,
    )
