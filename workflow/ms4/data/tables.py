"""Parquet, Arrow, Zstandard and data sets of the hub: what takes packages of the extra `data`.

A null inside an object is an absent key: Arrow gives all objects of a column the same keys, and
`{"city": null}` would be an argument that no one wrote.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import httpx2

from ms4.data.readers import Row
from ms4.data.sources import HubData, Source
from ms4.errors import Ms4Error

_ROWS = 64
"""Rows that are taken from a table at once."""
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def _missing(package: str, what: str) -> Ms4Error:
    return Ms4Error(
        f"{what} takes the package {package}, which is not installed: pip install 'ms4[data]'"
    )


def table_rows(path: Path, file: IO[bytes]) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file.

    Raises:
        Ms4Error: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", f"{path}: reading it") from error
    done, total = 0, None
    try:
        batches, total = _batches(file)
        for batch in batches:
            yield from _batch_rows(batch, done)
            done += batch.num_rows
    # pyarrow's own errors are of these kinds; a damaged page can come out as any of them.
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        text = " ".join(str(error).split())[:160] or type(error).__name__
        lost = max(total - done, 0) if total is not None else 0
        place = f"rows {done + 1} to {total} are" if lost else "what follows is"
        yield Row(
            done + 1 if lost else None,
            None,
            f"cannot be read on as a table ({text}): {place} lost; copy or make the file again",
            records=lost,
            ends=True,
        )


def _batches(file: IO[bytes]) -> tuple[Iterator[Any], int | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    head = file.read(6)
    file.seek(0)
    if head == b"ARROW1":
        opened = pa.ipc.open_file(file)
        return (opened.get_batch(i) for i in range(opened.num_record_batches)), None
    if head.startswith(b"\xff\xff\xff\xff"):
        file.seek(-8, io.SEEK_END)
        ended = file.read(8) == _END_OF_STREAM
        file.seek(0)
        return _stream(pa.ipc.open_stream(file), ended), None
    parquet = pq.ParquetFile(file)
    return parquet.iter_batches(batch_size=_ROWS), parquet.metadata.num_rows


def _stream(reader: Any, ended: bool) -> Iterator[Any]:
    yield from reader
    if not ended:
        raise ValueError("the end mark is missing: the file may be cut off")


def _batch_rows(batch: Any, done: int) -> Iterator[Row]:
    for first in range(0, batch.num_rows, _ROWS):
        part = batch.slice(first, _ROWS)
        try:
            records = _records(part)
        except ValueError:  # one of them cannot be read, so each alone
            records = [None] * part.num_rows
        for at, record in enumerate(records):
            number = done + first + at + 1
            if record is not None:
                yield Row(number, _without_nulls(record))
                continue
            try:
                yield Row(number, _without_nulls(_records(part.slice(at, 1))[0]))
            except ValueError as error:
                text = " ".join(str(error).split())[:100]
                yield Row(number, None, f"not readable ({text}); correct or remove it")


def _records(part: Any) -> list[Any]:
    """The records of some rows.

    Raises:
        ValueError: they are damaged.
    """
    # Arrow trusts what a file says of itself: converting damaged rows can end the process.
    part.validate(full=True)
    try:
        records: list[Any] = part.to_pylist()
    except OverflowError as error:  # a date beyond those of Python
        raise ValueError(str(error)) from error
    return records


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def pinned(source: Source) -> Source:
    """The source at the commit that its revision stands for now. A file, and what cannot be looked
    up, stays as it is: reading it says why."""
    if source.hub is None:
        return source
    from huggingface_hub import HfApi  # takes a second to import

    try:
        found = HfApi().dataset_info(source.hub.id, revision=source.hub.revision)
    except (httpx2.HTTPError, OSError, ValueError):
        return source
    return replace(source, hub=replace(source.hub, revision=found.sha or source.hub.revision))


def hub_rows(data: HubData) -> Iterator[Row]:
    """Yield the rows of a data set of the hub, which stream.

    Raises:
        Ms4Error: the package datasets is not installed.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise _missing("datasets", f"the hub's data set {data.id}") from error
    done = 0
    try:
        # No code of the data set is run: datasets has had no way to since version 4.
        rows = datasets.load_dataset(
            data.id, name=data.subset, revision=data.revision, split=data.split, streaming=True
        )
        # Images stay as their bytes and names.
        rows = rows.decode(False)
        for number, record in enumerate(rows, 1):
            yield Row(number, _without_nulls(record))
            done = number
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        yield Row(
            None,
            None,
            f"cannot be read on after {done} rows ({text}); check its id, revision and split, and "
            "the network",
            records=0,
            ends=True,
        )
        return
    if not done:
        fault = "holds no samples; leave it out"
        yield Row(None, None, fault, records=0, ends=True)


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of one or more frames; an end inside a frame is an error, which the
    package's own reader passes over."""

    def __init__(self, file: IO[bytes], package: Any) -> None:
        self._file = file
        self._package = package
        self._frame: Any = None
        self._output = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(4096)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._package.ZstdError as error:
                raise EOFError(str(error)) from error
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def zstd_stream(file: IO[bytes]) -> IO[bytes]:
    """The decompressed bytes of a Zstandard file.

    Raises:
        Ms4Error: the package zstandard is not installed.
    """
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise _missing("zstandard", "reading a .zst file") from error
    return io.BufferedReader(_Zstandard(file, zstandard), 1 << 16)
