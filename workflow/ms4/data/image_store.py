"""The images of packed data: each distinct one once, as the pixels that the vision tower sees.

`images.safetensors` holds

    pixels   BF16 [N]      all images, one after the other, each [3, height, width]
    starts   I64  [I + 1]  image i is pixels[starts[i]:starts[i + 1]]
    grids    I32  [I, 2]   columns and rows of its tokens; width and height are 28 times these
    sha256   U8   [I, 32]  of the file that it came from
    document_starts  I64 [D + 1]  document d of the packed data shows the images
    document_images  I64 [uses]   document_images[document_starts[d]:document_starts[d + 1]],
                                  in the order of their tokens

BF16 is what the vision tower computes in on a GPU. The pixels come first, so that the file is
written as they are made; its header is put into the room that was left for it at the end.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4.data.images import UNIT, EncodedImage, Grid, check_scaling, pixels
from ms4.data.packed import map_tensors
from ms4.manifest import commit_file

_HEADER = 4096
"""Bytes before the data: length and header, filled up with blanks."""

_DTYPES = {
    "pixels": "BF16",
    "starts": "I64",
    "grids": "I32",
    "sha256": "U8",
    "document_starts": "I64",
    "document_images": "I64",
}

Uint16s = npt.NDArray[np.uint16]


def to_bf16(values: npt.NDArray[np.float32]) -> Uint16s:
    """The bits of finite values in BF16, rounded to the nearest, ties to even; as torch does it."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))
    return (rounded >> 16).astype(np.uint16)


def _prepare(spool: Path, offset: int, size: int, max_size: int) -> bytes:
    """The pixels of an image that lies in the spool."""
    with spool.open("rb") as file:
        file.seek(offset)
        return to_bf16(pixels(file.read(size), max_size)).tobytes()


class ImageStoreWriter:
    """Collects images, then writes the store; use it as a context manager.

    Images are kept in a file beside the store until `finish`, so memory stays flat.
    """

    def __init__(self, path: Path, max_size: int, workers: int = 1) -> None:
        """Begin a store.

        Args:
            path: where it goes.
            max_size: longest side of an image in pixels.
            workers: threads that decode and scale; the file is the same for any number.

        Raises:
            Ms4Error: opencv is not installed.
        """
        check_scaling()
        self._path, self._max_size, self._workers = path, max_size, workers
        self._spool = path.with_name(f".{path.name}.{os.getpid()}.spool.tmp")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._numbers: dict[bytes, int] = {}
        self._grids: list[Grid] = []
        self._sizes: list[int] = []
        self._uses, self._use_starts = array("q"), array("q", [0])
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._spool.open("wb")

    def __enter__(self) -> ImageStoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spool.unlink(missing_ok=True)
        self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk takes not even what was still to be written
            self._file.close()

    def add_document(self, images: Sequence[EncodedImage]) -> None:
        """Note the next document of the packed data, in their order, and the images it shows."""
        self._uses.extend(self.add(image) for image in images)
        self._use_starts.append(len(self._uses))

    def add(self, image: EncodedImage) -> int:
        """The image's number in the store; an equal file gets the number that it has."""
        number = self._numbers.setdefault(image.sha256, len(self._numbers))
        if number == len(self._grids):
            self._grids.append(image.grid)
            self._sizes.append(len(image.raw))
            self._file.write(image.raw)
        return number

    def finish(self) -> dict[str, int]:
        """Write the store; returns how many images and bytes it holds."""
        self._file.close()
        starts = np.zeros(len(self._grids) + 1, dtype=np.int64)
        np.cumsum([3 * UNIT * UNIT * c * r for c, r in self._grids], out=starts[1:])
        with self._temporary.open("wb") as out:
            out.write(bytes(_HEADER))
            for number, made in enumerate(self._prepared()):
                if len(made) != 2 * (starts[number + 1] - starts[number]):
                    raise AssertionError("an image's pixels are not those of its grid")
                out.write(made)
            tables: list[tuple[str, str, npt.NDArray[Any]]] = [
                ("starts", "I64", starts),
                ("grids", "I32", np.array(self._grids, dtype=np.int32).reshape(-1, 2)),
                (
                    "sha256",
                    "U8",
                    np.frombuffer(b"".join(self._numbers), dtype=np.uint8).reshape(-1, 32),
                ),
                ("document_starts", "I64", np.array(self._use_starts, dtype=np.int64)),
                ("document_images", "I64", np.array(self._uses, dtype=np.int64)),
            ]
            end = 2 * int(starts[-1])
            header: dict[str, Any] = {
                "pixels": {"dtype": "BF16", "shape": [end // 2], "data_offsets": [0, end]}
            }
            for name, dtype, table in tables:
                out.write(table.tobytes())
                header[name] = {
                    "dtype": dtype,
                    "shape": list(table.shape),
                    "data_offsets": [end, end + table.nbytes],
                }
                end += table.nbytes
            text = json.dumps(header, separators=(",", ":")).encode()
            out.seek(0)
            out.write((_HEADER - 8).to_bytes(8, "little") + text.ljust(_HEADER - 8))
        commit_file(self._temporary, self._path)
        return {"distinct": len(self._grids), "bytes": self._path.stat().st_size}

    def _prepared(self) -> Iterator[bytes]:
        """Every image's pixels in order; a few are under way at a time."""
        offsets = np.cumsum([0, *self._sizes]).tolist()
        tasks = [
            (self._spool, offset, size, self._max_size)
            for offset, size in zip(offsets, self._sizes, strict=False)
        ]
        if self._workers == 1 or len(tasks) < 2:
            for task in tasks:
                yield _prepare(*task)
            return
        # Threads do: decoding, scaling and numpy let others run meanwhile.
        with ThreadPoolExecutor(self._workers) as pool:
            ahead: deque[Future[bytes]] = deque()
            for task in tasks:
                ahead.append(pool.submit(_prepare, *task))
                if len(ahead) > 2 * self._workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


class ImageStore:
    """The store, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Open a store.

        Raises:
            Ms4Error: it is missing or not what `preprocess` writes.
        """
        tables = map_tensors(path, _DTYPES)
        self._pixels, self._starts = tables["pixels"], tables["starts"]
        self.grids = tables["grids"]
        """int32 [I, 2]: columns and rows of each image's tokens."""
        self.sha256 = tables["sha256"]
        """uint8 [I, 32]: of the files that they came from."""
        self._use_starts, self._uses = tables["document_starts"], tables["document_images"]

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def documents(self) -> int:
        """Documents of the packed data."""
        return len(self._use_starts) - 1

    def document(self, number: int) -> list[int]:
        """Numbers of the images of a document, in the order of their tokens."""
        found: list[int] = self._uses[
            self._use_starts[number] : self._use_starts[number + 1]
        ].tolist()
        return found

    def pixels(self, number: int) -> Uint16s:
        """The bits of an image's BF16 pixels, [3, height, width]; not copied."""
        columns, rows = self.grids[number].tolist()
        part = self._pixels[self._starts[number] : self._starts[number + 1]]
        return part.reshape(3, rows * UNIT, columns * UNIT)
