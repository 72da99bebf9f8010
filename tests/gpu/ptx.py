"""What the kernels compile to, at the shapes of real models: `PYTHONPATH=core:tests python -m gpu.ptx [80 90]` prints it.

Registers and local memory (spills) are ptxas's; wide loads are those of 16 bytes, `ld.global.v4` or `cp.async` of 16.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu.doubles.triton_driver import device, pretend_gpu, resources

from lorax_core.kernels.elementwise import Angles
from lorax_core.kernels.triton import lora, rows
from lorax_core.kernels.triton.elementwise import TritonElementwise
from lorax_core.modeling.activation import get_activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SITES = {"0.5B qkv": (896, 1152), "7B gate_up": (3584, 37888), "7B down": (18944, 3584)}
WIDTHS = (896, 3584, 16384)
KERNELS = (lora.shrink, lora.expand, rows.normalise_rows, rows.gate_rows, rows.turn_rows)


@dataclass(frozen=True)
class Line:
    """One kernel, compiled."""

    kernel: str
    case: str
    dtype: torch.dtype
    registers: int
    local: int
    shared: int
    wide: int
    narrow: int  # loads of 2 bytes
    tensor_cores: int
    tf32: bool
    ttir: str


def compiled(arch: int) -> Iterator[Line]:
    """A line for each kernel, case and dtype; nothing is computed."""
    for kernel in KERNELS:
        kernel.device_caches.pop(device(arch), None)  # what was compiled before would not be seen
    with pretend_gpu(arch, computes=False):
        for dtype in DTYPES:
            for case, launch in _cases(dtype):
                known = {kernel: set(_cache(kernel, arch)) for kernel in KERNELS}
                launch()
                for kernel in KERNELS:
                    for key, made in _cache(kernel, arch).items():
                        if key not in known[kernel]:
                            yield _line(made, case, dtype)


def _cache(kernel, arch: int) -> dict:
    return kernel.device_caches[device(arch)][0]


def _line(made, case: str, dtype: torch.dtype) -> Line:
    ptx, usage = made.asm["ptx"], resources(made.asm["cubin"])
    return Line(
        made.metadata.name,
        case,
        dtype,
        usage["REG"],
        usage["LOCAL"],
        made.metadata.shared,
        len(
            re.findall(
                r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.c[ag]\.shared\.global \[[^;]*?0x10", ptx
            )
        ),
        len(re.findall(r"ld\.global\S*\.[bu]16|ld\.global\S*\.b8", ptx)),
        len(re.findall(r"\bmma\.sync|\bwgmma\.mma", ptx)),
        "tf32" in ptx,
        made.asm["ttir"],
    )


def _cases(dtype: torch.dtype):
    for site, (inputs, outputs) in SITES.items():
        for count, aligned in ((8, True), (8, False), (512, True)):
            yield (
                f"{site}, {count} rows{'' if aligned else ', unaligned'}",
                lambda i=inputs, o=outputs, c=count, a=aligned: _lora(i, o, c, a, dtype),
            )
    kernels = TritonElementwise()
    for width in WIDTHS:
        x, weight = torch.zeros(4, width, dtype=dtype), torch.zeros(width, dtype=dtype)
        yield f"add, rms norm of {width}", lambda x=x, w=weight: kernels.add_rms_norm(x, x, w, 1e-6)
        yield f"add, layer norm of {width}", lambda x=x, w=weight: kernels.add_layer_norm(x, x, w, w, 1e-5)
        yield f"rms norm of {width}", lambda x=x, w=weight: kernels.rms_norm(x, w, 1e-6)
    for act in ("silu", "gelu", "gelu_new", "relu"):
        gate_up = torch.zeros(4, 2 * 4864, dtype=dtype)
        yield f"{act} gate", lambda a=act, x=gate_up: kernels.gated_act(x, get_activation(a))
    for heads, kv_heads, dim in ((14, 2, 64), (28, 4, 128)):
        yield (
            f"rotate, store {heads}/{kv_heads} x {dim}",
            lambda h=heads, k=kv_heads, d=dim: _turn(kernels, h, k, d, dtype),
        )


def _lora(inputs: int, outputs: int, count: int, aligned: bool, dtype: torch.dtype) -> None:
    form = lora.form(count)
    tiles = torch.zeros(4, lora.TILE_FIELDS, dtype=torch.int64)
    launch = lora.Launch(tiles, lora.scratch(count, 16, form, torch.device("cpu")), count, 16, form)
    x, y = torch.zeros(1, inputs, dtype=dtype), torch.zeros(1, outputs, dtype=dtype)
    launch.add(0, 16, x, y, aligned=aligned)


def _turn(kernels: TritonElementwise, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv = torch.zeros(2, heads + 2 * kv_heads, dim, dtype=dtype)
    angles = Angles(*torch.zeros(2, 2, 1, dim // 2, dtype=dtype))
    cache = torch.zeros(2, 16, kv_heads, dim, dtype=dtype)
    kernels.rotate_and_store(
        *qkv.split([heads, kv_heads, kv_heads], 1), angles, cache, cache, torch.zeros(2, dtype=torch.int64)
    )


def main() -> None:
    """Print the table for the compute capabilities that are named."""
    for arch in [int(arg) for arg in sys.argv[1:]] or [80, 90]:
        print(f"sm_{arch}: registers, spills, shared bytes, loads of 16 bytes, of 2 bytes, tensor core products, TF32")
        for line in compiled(arch):
            print(
                f"  {line.kernel:15} {str(line.dtype)[6:]:9} {line.case:32} {line.registers:4} {line.local:4} {line.shared:6} "
                f"{line.wide:3} {line.narrow:3} {line.tensor_cores:3} {'tf32' if line.tf32 else ''}"
            )


if __name__ == "__main__":
    main()
