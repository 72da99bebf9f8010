"""The two backends as they are on a CPU with the doubles: a smaller workspace, and nothing to compile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from gpu.doubles.flash_attn_module import flash_attn_on_cpu
from gpu.doubles.flashinfer_module import flashinfer_on_cpu
from gpu.doubles.varlen import varlen_on_cpu

from lorax_core.attention.base import AttentionBackend
from lorax_core.attention.flash_attn import FlashAttnBackend, FlashAttnPackage, Packaging, TorchVarlen
from lorax_core.attention.flashinfer import FlashInferBackend
from lorax_core.plugins.spec import BackendSpec


class FlashInferOnCpu(FlashInferBackend):
    """FlashInfer over the double of its module."""

    workspace_bytes = 1 << 16

    @staticmethod
    def missing_tools() -> tuple[str, ...]:
        return ()


class FlashAttnOnCpu(FlashAttnBackend):
    """flash-attn over the double of its extension."""

    packagings: ClassVar[tuple[type[Packaging], ...]] = (FlashAttnPackage,)


class VarlenDouble(TorchVarlen):
    """torch's varlen_attn, where its operator is a double."""

    @staticmethod
    def compiled() -> bool:
        return True


class VarlenOnCpu(FlashAttnBackend):
    """torch's varlen_attn over the double of its operator."""

    packagings: ClassVar[tuple[type[Packaging], ...]] = (VarlenDouble,)


BACKENDS: dict[str, type[AttentionBackend]] = {
    "flashinfer": FlashInferOnCpu,
    "flash_attn": FlashAttnOnCpu,
    "varlen": VarlenOnCpu,
}


@contextlib.contextmanager
def backends_on_cpu() -> Iterator[None]:
    """Run all three on CPU tensors."""
    with flashinfer_on_cpu(), flash_attn_on_cpu(), varlen_on_cpu():
        yield


def declared(name: str) -> BackendSpec:
    """The declaration of one of them, for a CPU."""
    return BackendSpec(
        name=f"{name}-on-cpu",
        summary="On a CPU.",
        backend=f"gpu.doubles.backends:{BACKENDS[name].__name__}",
        device_types=("cpu",),
        priority=30,
    )
