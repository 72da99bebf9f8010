"""Other ways to write the same adapter: what versions and options of PEFT, and people, make of its file of tensors."""

from __future__ import annotations

from pathlib import Path

from builders import change_tensors
from safetensors.torch import load_file, save_file


def half(file: Path) -> None:
    """Every tensor in 16 bit."""
    change_tensors(file, lambda found: {name: tensor.half() for name, tensor in found.items()})


def infix(file: Path) -> None:
    """The adapter's own name within the names of tensors, as some versions wrote it."""

    def renamed(name: str) -> str:
        return name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")

    change_tensors(file, lambda found: {renamed(name): tensor for name, tensor in found.items()})


def sharded(file: Path) -> None:
    """The tensors in two files."""
    tensors = list(load_file(file).items())
    for at in (0, 1):
        save_file(dict(tensors[at::2]), file.with_name(f"adapter_model-0000{at + 1}-of-00002.safetensors"))
    file.unlink()
