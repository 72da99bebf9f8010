"""A checkpoint folder on disk.

Decides what counts as one: `config.json`, safetensors in one file or several with an index, and the small files beside
them. Knows nothing of architectures. Only safetensors is read; a pickle can run code, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorax_core.errors import CheckpointError, listed
from lorax_core.plugins.resolve import read_config
from lorax_core.untrusted import file_in, read_json

_CONVERT = "python -c \"from transformers import AutoModel; AutoModel.from_pretrained('PATH').save_pretrained('NEW')\""


class Checkpoint:
    """The files of one model. Reading names costs only the headers; tensors are read when asked for.

    Raises CheckpointError when the folder, its configuration or its weights are missing or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_config(self.path)
        # Before the weights are looked at: their int8 or packed tensors would fail later with an error about shapes.
        self._refuse_quantised()
        self.files = self._weight_files()
        # From the files' own headers and not from the index, which may be out of date.
        self.tensors: dict[str, Path] = {}
        for file in self.files:
            for name in _names(file):
                if name in self.tensors:
                    raise CheckpointError(f"tensor {name!r} is in both {self.tensors[name].name} and {file.name}")
                self.tensors[name] = file

    def json(self, name: str) -> dict[str, Any] | list[Any] | None:
        """A JSON file of the folder, or None when it is not there."""
        file = self.path / name
        if not file.is_file():
            return None
        found = read_json(file, CheckpointError)
        if not isinstance(found, (dict, list)):
            raise CheckpointError(f"{file} holds {type(found).__name__}, not an object or a list")
        return found

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the files."""
        with opened(self.tensors[name]) as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file, so that no more than one is held beyond what the caller keeps."""
        for file in self.files:
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    yield name, tensors.get_tensor(name)

    def _refuse_quantised(self) -> None:
        quantisation = self.config.get("quantization_config")
        if quantisation is not None:
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
            raise CheckpointError(
                f"{self.path} is quantised ({method!r}), which is not supported",
                hint="use the unquantised checkpoint that it was made from",
            )

    def _weight_files(self) -> list[Path]:
        index = self.json("model.safetensors.index.json")
        if index is not None:
            return self._indexed(index)
        single = self.path / "model.safetensors"
        if single.is_file():
            return [single]
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.path} has its weights only as pickles ({listed(pickles)}), which can run code and are not read",
                hint=f"save them as safetensors where you trust them: {_CONVERT}",
            )
        raise CheckpointError(
            f"{self.path} has no model.safetensors and no model.safetensors.index.json; it holds "
            f"{listed(sorted(p.name for p in self.path.iterdir()))}",
            hint="give the folder that transformers' save_pretrained wrote",
        )

    def _indexed(self, index: Any) -> list[Path]:
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / 'model.safetensors.index.json'} has no 'weight_map'")
        files = sorted({file_in(self.path, name, CheckpointError) for name in weight_map.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {listed(missing)}, which its index names", hint="copy or download the folder again"
            )
        return files


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; a corrupt one raises CheckpointError with the file's name."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({file.stat().st_size} bytes): {error}",
            hint="the file may be cut short, or a Git LFS pointer: copy or download it again",
        ) from error


def _names(file: Path) -> list[str]:
    with opened(file) as tensors:
        return list(tensors.keys())
