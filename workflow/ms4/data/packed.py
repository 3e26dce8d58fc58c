"""What `preprocess` leaves for training and evaluation: arrays that are mapped, not read.

docs/design.md describes the files under "Packed data". No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ms4 import manifest
from ms4.config_data import Effort
from ms4.errors import Ms4Error
from ms4.weights.shards import read_header

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]

_DTYPES: dict[str, str] = {
    # The widest first: so each array lies at a multiple of its element's size.
    "document_starts": "I64",
    "bin_documents": "I64",
    "bin_starts": "I64",
    "tokens": "I32",
    "trained": "U8",
}
_NUMPY: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "BF16": np.uint16, "U8": np.uint8}
"""BF16 as its bits."""


@dataclass(frozen=True)
class PackedData:
    """The training data as docs/design.md describes it under "Packed data"."""

    tokens: Int32s
    trained: Uint8s
    document_starts: Int64s
    bin_documents: Int64s
    bin_starts: Int64s

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    @property
    def bins(self) -> int:
        """Number of bins."""
        return len(self.bin_starts) - 1

    def bin(self, number: int) -> Int64s:
        """The numbers of the documents in a bin."""
        return self.bin_documents[self.bin_starts[number] : self.bin_starts[number + 1]]

    def document(self, number: int) -> tuple[Int32s, Uint8s]:
        """Tokens and trained mask of a document."""
        span = slice(self.document_starts[number], self.document_starts[number + 1])
        return self.tokens[span], self.trained[span]


@dataclass(frozen=True)
class TestSample:
    """A held-out sample in one reasoning effort: a line of `test.jsonl`."""

    __test__ = False  # not for pytest to collect

    set: str
    """Name of the held-out set."""
    line: int
    """Line in the set's file, from 1."""
    effort: Effort
    prompt: list[int]
    """Ends where the model begins to write its last turn."""
    tokens: list[int] | None
    """The whole conversation as the model should have written it; None under `high` if the
    sample's last turn holds no thinking."""
    trained: list[int] | None
    answer: str
    """The last turn as `Chat.decode_answer` gives it: without thinking, white space stripped."""
    images: list[int]
    """Numbers in `images.safetensors`, in the order of their tokens; all stand in the prompt."""


def load_packed(path: Path) -> PackedData:
    """Map `train.safetensors` into memory: nothing is read before it is used, nothing copied.

    Raises:
        Ms4Error: it is missing or not what `preprocess` writes.
    """
    return PackedData(**map_tensors(path, _DTYPES))


def map_tensors(path: Path, dtypes: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
    """Map a safetensors file that `preprocess` wrote, of exactly these tensors, into memory.

    Args:
        path: the file.
        dtypes: name → dtype as safetensors writes it; BF16 comes as its bits, uint16.

    Raises:
        Ms4Error: it is missing, or holds something else.
    """
    items = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY.items()}
    try:
        path.open("rb").close()
        entries = read_header(path, items)
        whole = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except FileNotFoundError as error:
        raise Ms4Error(
            f"{path} is missing: run `ms4 preprocess` (or `snakemake`) first."
        ) from error
    except OSError as error:
        raise Ms4Error(
            f"{path}: cannot be read ({error.strerror}); run `ms4 preprocess` again."
        ) from error
    except Ms4Error as error:  # what it advises is for weights
        raise Ms4Error(f"{path}: damaged or cut short; run `ms4 preprocess` again.") from error
    if {entry.name: entry.dtype for entry in entries.values()} != dict(dtypes):
        raise Ms4Error(f"{path}: not the tensors that it should hold; run `ms4 preprocess` again.")
    return {
        name: whole[entry.start : entry.start + entry.size]
        .view(_NUMPY[entry.dtype])
        .reshape(entry.shape)
        for name, entry in entries.items()
    }


def read_test(path: Path) -> Iterator[TestSample]:
    """Yield the lines of `test.jsonl`.

    Raises:
        Ms4Error: it is missing or not what `preprocess` writes.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield TestSample(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise Ms4Error(
                        f"{path}:{number}: not a line of `ms4 preprocess`; run it again."
                    ) from error
    except OSError as error:
        raise Ms4Error(
            f"{path}: cannot be read ({error.strerror}); run `ms4 preprocess` first."
        ) from error


class PackedWriter:
    """Writes `train.safetensors` from documents that come one at a time: only their lengths stay in
    memory. Use it as a context manager; without `finish`, nothing is left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lengths = array("q")
        self._temporary = {
            name: path.with_name(f".{path.name}.{name}.{os.getpid()}.tmp")
            for name in ("tokens", "trained", "whole")
        }
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> PackedWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("tokens", "trained"):
            self._files[name] = self._temporary[name].open("w+b", buffering=1 << 20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for path in self._temporary.values():
            path.unlink(missing_ok=True)
        for file in self._files.values():
            with suppress(OSError):  # a full disk takes not even what was still to be written
                file.close()

    def add(self, tokens: Int32s, trained: Uint8s) -> None:
        """Take a document."""
        self._files["tokens"].write(np.ascontiguousarray(tokens, dtype="<i4").data)
        self._files["trained"].write(np.ascontiguousarray(trained, dtype=np.uint8).data)
        self._lengths.append(len(tokens))

    @property
    def lengths(self) -> Int64s:
        """Tokens of each document."""
        return np.frombuffer(self._lengths, dtype=np.int64).copy()

    def finish(self, bin_documents: Int64s, bin_starts: Int64s) -> str:
        """Write the file with these bins, under its name when it is whole; returns its SHA-256."""
        starts = np.zeros(len(self._lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        small = {
            "document_starts": starts,
            "bin_documents": bin_documents,
            "bin_starts": bin_starts,
        }
        tokens = int(starts[-1])
        shapes = {name: len(values) for name, values in small.items()}
        shapes |= {"tokens": tokens, "trained": tokens}
        head: dict[str, Any] = {}
        at = 0
        for name, dtype in _DTYPES.items():
            end = at + shapes[name] * np.dtype(_NUMPY[dtype]).itemsize
            head[name] = {"dtype": dtype, "shape": [shapes[name]], "data_offsets": [at, end]}
            at = end
        text = json.dumps(head, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._temporary["whole"].open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for values in small.values():
                out.write(np.ascontiguousarray(values, dtype="<i8").tobytes())
            for name in ("tokens", "trained"):
                file = self._files[name]
                file.flush()
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)
        # Hashed while it goes to the disk: these seconds are no worker's.
        with self._temporary["whole"].open("rb") as whole, ThreadPoolExecutor(1) as thread:
            digest = thread.submit(hashlib.file_digest, whole, "sha256")
            manifest.commit_file(self._temporary["whole"], self._path)
            return digest.result().hexdigest()
