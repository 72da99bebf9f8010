"""A library for ARM whose functions are called like those of `ctypes.CDLL`, on a machine of another kind.

Decides how a source is compiled for another processor (by zig), and how its functions run here: in an emulator (unicorn) that
works on the memory of this process at the same addresses, so tensors are handed over as ever. Knows nothing of what they do.
"""

from __future__ import annotations

import ctypes
import math
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import unicorn
from unicorn import arm64_const as arm

from lorax_core.kernels.native.build import FLAGS

ARM, X86 = "aarch64-linux-gnu", "x86_64-linux-gnu"
# Lower than whatever Linux gives a process.
BASE, IMPORTS, STACK, END = 0x100000, 0x8000000, 0x9000000, 0xA000000
STACK_BYTES, CHUNK, PAGE = 1 << 20, 1 << 20, 4096
RETURN = struct.pack("<I", 0xD65F03C0)
# Of ELF: kinds of segment, entries of the dynamic section, kinds of relocation.
LOADED, DYNAMIC = 1, 2
PLT_BYTES, HASH, STRINGS, SYMBOLS, RELA, RELA_BYTES, PLT = 2, 4, 5, 6, 7, 8, 23
ABSOLUTE, GLOBAL, JUMP, RELATIVE = 257, 1025, 1026, 1027
MEMORY = """
extern "C" void *memcpy(void *to, const void *from, unsigned long count) {
    for (unsigned long i = 0; i < count; ++i) ((char *)to)[i] = ((const char *)from)[i];
    return to;
}
extern "C" void *memset(void *to, int value, unsigned long count) {
    for (unsigned long i = 0; i < count; ++i) ((char *)to)[i] = (char)value;
    return to;
}
extern "C" void *memmove(void *to, const void *from, unsigned long count) {
    auto *into = (volatile char *)to;
    auto *of = (const volatile char *)from;
    if (into < of)
        for (unsigned long i = 0; i < count; ++i) into[i] = of[i];
    else
        while (count--) into[count] = of[count];
    return to;
}
"""


def zig(target: str, *arguments: str) -> str:
    """Runs zig's C++ compiler (clang) for a target; gives what it says."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def cross_compile(source: Path, to: Path, *flags: str, target: str, processor: str) -> str:
    """Compiles a source for a processor with the project's flags; gives what the compiler says."""
    ours = [flag for flag in FLAGS if flag != "-march=native"]
    return zig(target, f"-mcpu={processor}", *ours, *flags, "-c", str(source), "-o", str(to))


class Emulated:
    """The functions of a source, compiled for an ARM processor, as attributes."""

    def __init__(self, source: Path, folder: Path, processor: str) -> None:
        code, memory, library = (folder / f"{source.stem}.{ending}" for ending in ("o", "memory.cpp", "so"))
        # For one thread, and with nothing but what the source has itself: the rest is in MEMORY and IMPORTED.
        alone = ("-fno-openmp", "-Dthread_local=", "-fno-threadsafe-statics")
        cross_compile(source, code, *alone, target=ARM, processor=processor)
        memory.write_text(MEMORY, encoding="utf-8")
        linked = ("-shared", "-nostdlib", "-Wl,-z,undefs", "-Wl,--hash-style=sysv", "-o", str(library))
        zig(ARM, "-O2", "-fPIC", "-fno-builtin", str(memory), str(code), *linked)
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self._machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # switches vectors on
        for start in (IMPORTS, END):
            self._machine.mem_map(start, PAGE)
            self._machine.mem_write(start, RETURN * (PAGE // 4))
        self._machine.mem_map(STACK, STACK_BYTES)
        self._imports: list[str] = []
        self._symbols: dict[str, int] = {}
        self._load(library.read_bytes())
        self._machine.hook_add(unicorn.UC_HOOK_CODE, self._imported, begin=IMPORTS, end=IMPORTS + PAGE)
        self._machine.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._share)
        self._shared: list[tuple[int, int]] = []
        self._failed: Exception | None = None

    def __getattr__(self, name: str) -> Function:
        if name not in self._symbols:
            raise AttributeError(name)
        return Function(self, name)

    def call(self, name: str, arguments: list[int], floats: list[float]) -> int:
        """Run a function; what it must not read or write raises UcError. Floats have registers of their own."""
        for register, number in zip(range(arm.UC_ARM64_REG_S0, arm.UC_ARM64_REG_S0 + 8), floats, strict=False):
            self._machine.reg_write(register, struct.unpack("<I", struct.pack("<f", number))[0])
        for register, value in zip(range(arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X0 + 8), arguments, strict=False):
            self._machine.reg_write(register, value)
        rest = arguments[8:]
        top = STACK + STACK_BYTES - PAGE
        self._machine.mem_write(top, struct.pack(f"<{len(rest)}q", *rest))
        self._machine.reg_write(arm.UC_ARM64_REG_SP, top)
        self._machine.reg_write(arm.UC_ARM64_REG_LR, END)
        try:
            self._machine.emu_start(self._symbols[name], END)
        finally:
            # What the process frees must not be found here later.
            for start, size in self._shared:
                self._machine.mem_unmap(start, size)
            self._shared.clear()
        if self._failed:
            raise self._failed
        return int(self._machine.reg_read(arm.UC_ARM64_REG_X0))

    def _load(self, code: bytes) -> None:
        (offset,), (count,) = struct.unpack_from("<Q", code, 32), struct.unpack_from("<H", code, 56)
        headers = [struct.unpack_from("<IIQQQQQQ", code, offset + 56 * at) for at in range(count)]
        end = max(address + size for kind, _, _, address, _, _, size, _ in headers if kind == LOADED)
        self._machine.mem_map(BASE, -(-end // PAGE) * PAGE)
        for kind, _, start, address, _, held, _, _ in headers:
            if kind == LOADED:
                self._machine.mem_write(BASE + address, code[start : start + held])
        (dynamic,) = (header for header in headers if header[0] == DYNAMIC)
        found = dict(struct.iter_unpack("<QQ", code[dynamic[2] : dynamic[2] + dynamic[5]]))
        relocations = b"".join(
            bytes(self._machine.mem_read(BASE + found[start], found[size]))
            for start, size in ((RELA, RELA_BYTES), (PLT, PLT_BYTES))
            if start in found
        )
        _, count = struct.unpack("<II", self._machine.mem_read(BASE + found[HASH], 8))
        symbols = struct.iter_unpack("<IBBHQQ", self._machine.mem_read(BASE + found[SYMBOLS], 24 * count))
        table = [
            (self._string(BASE + found[STRINGS] + name), BASE + address if section else 0)
            for name, _, _, section, address, _ in symbols
        ]
        self._symbols = {name: address for name, address in table if address and name}
        for at, information, addend in struct.iter_unpack("<QQq", relocations):
            kind, symbol = information & 0xFFFFFFFF, information >> 32
            assert kind in (ABSOLUTE, GLOBAL, JUMP, RELATIVE), kind
            name, address = table[symbol]
            value = BASE if kind == RELATIVE else address or self._import(name)
            self._machine.mem_write(BASE + at, struct.pack("<Q", value + addend))

    def _string(self, at: int) -> str:
        end = at
        while self._machine.mem_read(end, 1) != b"\0":
            end += 1
        return self._machine.mem_read(at, end - at).decode()

    def _import(self, name: str) -> int:
        assert name in IMPORTED, f"the library asks for {name}"
        if name not in self._imports:
            self._imports.append(name)
        return IMPORTS + 4 * self._imports.index(name)

    def _imported(self, machine: unicorn.Uc, address: int, _size: int, _data: Any) -> None:
        try:
            IMPORTED[self._imports[(address - IMPORTS) // 4]](machine)
        except Exception as error:  # an exception that leaves a callback is lost
            self._failed = error
            machine.emu_stop()

    def _share(self, machine: unicorn.Uc, _kind: int, address: int, size: int, _value: int, _data: Any) -> bool:
        """Some memory of the process around an address is mapped where it is."""
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            place, rights = line.split()[:2]
            start, end = (int(number, 16) for number in place.split("-"))
            if start <= address < end and rights[0] == "r":
                start, end = max(start, address // CHUNK * CHUNK), min(end, address // CHUNK * CHUNK + CHUNK)
                allowed = unicorn.UC_PROT_READ | (unicorn.UC_PROT_WRITE if rights[1] == "w" else 0)
                machine.mem_map_ptr(start, end - start, allowed, ctypes.c_void_p(start))
                self._shared.append((start, end - start))
                return True
        return False


class Function:
    """One function, called with numbers and addresses."""

    def __init__(self, library: Emulated, name: str) -> None:
        self.library, self.name = library, name
        self.argtypes: Sequence[type] = ()
        self.restype: type | None = None

    def __call__(self, *arguments: float | None) -> int | None:
        kinds = [*self.argtypes] or [ctypes.c_int64] * len(arguments)
        given = list(zip(kinds, arguments, strict=True))
        whole = [int(one or 0) for kind, one in given if kind is not ctypes.c_float]
        found = self.library.call(self.name, whole, [float(one or 0) for kind, one in given if kind is ctypes.c_float])
        return None if self.restype is None else found


def _of_float(function: Callable[[float, unicorn.Uc], float]) -> Callable[[unicorn.Uc], None]:
    """What an imported function does to the registers, for one from a float to a float."""

    def run(machine: unicorn.Uc) -> None:
        (value,) = struct.unpack("<f", struct.pack("<I", machine.reg_read(arm.UC_ARM64_REG_S0) & 0xFFFFFFFF))
        result = struct.unpack("<I", struct.pack("<f", function(value, machine)))[0]
        machine.reg_write(arm.UC_ARM64_REG_S0, result)

    return run


def _exponent(machine: unicorn.Uc) -> int:
    return ctypes.c_int32(machine.reg_read(arm.UC_ARM64_REG_W0)).value


IMPORTED = {
    "expf": _of_float(lambda value, _: math.exp(value)),
    "tanhf": _of_float(lambda value, _: math.tanh(value)),
    "ldexpf": _of_float(lambda value, machine: math.ldexp(value, _exponent(machine))),
}
"""What sources call of the C library."""
