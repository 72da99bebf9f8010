"""A checkpoint folder on disk.

Decides what counts as one: `config.json`, safetensors in one file or several with an index, and the small files beside
them. Knows nothing of architectures. Only safetensors is read; a pickle can run code, and is refused. Whatever goes wrong
while a file is read is a CheckpointError.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorax_core.errors import CheckpointError, listed
from lorax_core.plugins.resolve import read_config
from lorax_core.untrusted import file_in, guarded, read_json, regular

HEADER_BYTES: Final = 32 * 2**20
"""The largest header of a weight file that is read: that of 250,000 tensors in one file."""
MAX_TENSORS: Final = 1_000_000
NAME_LENGTH: Final = 1_000
FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the types that weights may have; 8 bit would need its scales."""
_AGAIN: Final = "the file may be cut short, or a Git LFS pointer: copy or download it again"
_CONVERT = "python -c \"from transformers import AutoModel; AutoModel.from_pretrained('PATH').save_pretrained('NEW')\""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a file's header says of a tensor; `dtype` in safetensors' spelling (F32, BF16, I64)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        bits = re.search("[0-9]+", self.dtype)  # of F8_E4M3 the first; BOOL is a byte
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8


class Checkpoint:
    """The files of one model. `tensors` costs only the headers; the numbers are read when asked for.

    Raises CheckpointError when the folder, its configuration or its weights are missing or corrupt.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with guarded(CheckpointError, f"'{self.path}' cannot be read as a checkpoint", "download or copy it again"):
            self.config: dict[str, Any] = read_config(self.path)
            # Before the weights are looked at: their int8 or packed tensors would fail later with an error about shapes.
            self._refuse_quantised()
            self.files = self._weight_files()
            self.tensors = self._headers()

    @property
    def nbytes(self) -> int:
        """The size of the files that hold tensors."""
        return sum(file.stat().st_size for file in self.files)

    def json(self, name: str) -> dict[str, Any] | list[Any] | None:
        """A JSON file of the folder by a name from the folder's files, or None when it is not there."""
        file = file_in(self.path, name, CheckpointError)
        if not _is_there(file):
            return None
        found = read_json(file, CheckpointError)
        if not isinstance(found, (dict, list)):
            raise CheckpointError(
                f"'{file}' holds {type(found).__name__}, not an object or a list", hint="download or copy it again"
            )
        return found

    def reader(self) -> Callable[[str], Tensor]:
        """What gives tensors by their names in the files; they lie in mapped files: a caller that keeps numbers copies them."""
        return TensorReader(self)

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the files."""
        return self.reader()(name)

    def _headers(self) -> dict[str, StoredTensor]:
        """Every tensor, from the files' own headers and not from the index, which may be out of date."""
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, stored in read_headers(file).items():
                if name in found:
                    raise CheckpointError(
                        f"tensor {name!r:.120} is in both {found[name].file.name} and {file.name}",
                        hint="copy or download the folder again, into an empty one",
                    )
                found[name] = stored
            if len(found) > MAX_TENSORS:
                raise CheckpointError(
                    f"'{self.path}' holds more than {MAX_TENSORS:,} tensors, which no model has", hint=_AGAIN
                )
        return found

    def _refuse_quantised(self) -> None:
        quantisation = self.config.get("quantization_config")
        if quantisation is not None:
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
            raise CheckpointError(
                f"{self.path} is quantised ({method!r:.60}), which is not supported",
                hint="use the unquantised checkpoint that it was made from",
            )

    def _weight_files(self) -> list[Path]:
        index = self.json("model.safetensors.index.json")
        if index is not None:
            return self._indexed(index)
        single = self.path / "model.safetensors"
        if _is_there(single):
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
            raise CheckpointError(
                f"{self.path / 'model.safetensors.index.json'} has no 'weight_map'",
                hint="copy or download the folder again",
            )
        files = sorted({file_in(self.path, name, CheckpointError) for name in weight_map.values()})
        missing = [file.name for file in files if not _is_there(file)]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {listed(missing)}, which its index names", hint="copy or download the folder again"
            )
        return files


class TensorReader:
    """Tensors of a checkpoint by their names in the files. They lie in the mapped file: callers that keep numbers copy them.

    Of the files about `most_mapped` bytes at a time count as memory of this process.
    """

    def __init__(self, checkpoint: Checkpoint, most_mapped: int = 2**28) -> None:
        self._checkpoint, self._most = checkpoint, most_mapped
        self._open: dict[Path, Any] = {}
        self._seen: dict[Path, tuple[int, ...]] = {}  # what a file was when it was first opened
        self._mapped = 0  # bytes that were read since files were opened

    def __call__(self, name: str) -> Tensor:
        stored = self._checkpoint.tensors[name]
        if self._mapped > self._most:
            # What was read of a mapped file counts until the file is closed.
            self._open.clear()
            self._mapped = 0
        if stored.file not in self._open:
            with opened(stored.file) as tensors:
                self._open[stored.file] = tensors
            self._refuse_another(stored.file)
        with _as_checkpoint_error(stored.file):
            found: Tensor = self._open[stored.file].get_tensor(name)
        if tuple(found.shape) != stored.shape:
            raise _changed(stored.file)
        self._mapped += found.nbytes
        return found

    def _refuse_another(self, file: Path) -> None:
        status = file.stat()
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen.setdefault(file, now) != now:
            raise _changed(file)


def _changed(file: Path) -> CheckpointError:
    return CheckpointError(f"'{file}' was changed while it was read", hint="load it again when nothing writes to it")


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file; one that is corrupt, or no file at all, raises CheckpointError with its name."""
    size = regular(file, CheckpointError)
    with _as_checkpoint_error(file):
        with file.open("rb") as found:
            header = int.from_bytes(found.read(8), "little")
        # The library reads up to 100 MB, for which it takes seconds and gigabytes.
        if HEADER_BYTES < header <= size:
            raise CheckpointError(
                f"'{file}' has a header of {header:,} bytes; at most {HEADER_BYTES:,} are read", hint=_AGAIN
            )
        yield safe_open(file, framework="pt")


@contextmanager
def _as_checkpoint_error(file: Path) -> Iterator[None]:
    with guarded(CheckpointError, f"'{file}' cannot be read", _AGAIN):
        try:
            yield
        except RuntimeError as error:
            if "Cannot allocate memory" in str(error):  # torch's for a file that there is no room to map
                raise MemoryError(str(error)) from error
            raise
        except SafetensorError as error:
            raise CheckpointError(
                f"{file} is not a readable safetensors file ({file.stat().st_size} bytes): {error}", hint=_AGAIN
            ) from error


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """What a weight file holds, without its numbers; raises CheckpointError when it cannot be read."""
    with opened(file) as tensors:
        names: list[str] = tensors.keys()
        long = next((name for name in names if len(name) > NAME_LENGTH), None)
        if long is not None:
            raise CheckpointError(f"'{file}' has a tensor with a name of {len(long):,} characters", hint=_AGAIN)
        slices = {name: tensors.get_slice(name) for name in names}
        return {name: StoredTensor(file, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite."""
    if not tensor.numel():
        return True
    # Both are NaN where any number is; one pass without temporaries, 20 times as fast as isfinite().all().
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def _is_there(file: Path) -> bool:
    # A link that leads nowhere is there: it is an error, and not a checkpoint without that file.
    return os.path.lexists(file)
