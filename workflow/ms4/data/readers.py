"""Files → rows, one at a time: each is a record, or says why it is none.

JSONL, JSON (a list, or objects one after another), CSV, TSV and plain text are read here, also
compressed; tables of pyarrow and data sets of the hub in `tables.py`. A file larger than memory
streams. Text stays unparsed: `parse_row` is for whoever reads the rows, in parallel perhaps.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ms4.data.faults import SampleFault, count
from ms4.data.json_stream import MAX_RECORD, Unfinished, split_values
from ms4.data.json_text import parse_json
from ms4.data.sources import FAULTS_FILE, Source, is_pattern

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMPRESSED = {".gz", ".zst", ".zstd"}
_OTHER_UTF = {
    # UTF-32 first: its mark begins with that of UTF-16.
    "UTF-32": (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"),
    "UTF-16": (b"\xff\xfe", b"\xfe\xff"),
}
_OTHER_PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_TEXT_SUFFIXES = {".txt", ".md", ".text"}
_TABLES = {".csv": ",", ".tsv": "\t"}
MAX_CELLS = 1_000_000
"""Of a row of a table."""
_LOCALE = sys.getfilesystemencoding()
_NO_FILES = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
_INTERRUPTED = "the compressed data ends or is damaged here: what follows is lost; copy it again"


@dataclass(frozen=True)
class Row:
    """A record as a file has it."""

    line: int | None
    """Where it begins, from 1 (in tables: its number); None: a fault of the whole file."""
    value: object = None
    """Unparsed text, or a record."""
    fault: str | None = None
    """Why it is none, and what to do."""
    records: int = 1
    """How many records it stands for: 0 for a fault of a file, several for a damaged stretch."""
    ends: bool = False
    """A fault of the file: the reading of it ends here, with records lost perhaps."""


def parse_row(row: Row, changed: Counter[str] | None = None) -> Any:
    """The record of a row; `changed` as in `parse_json`.

    Raises:
        SampleFault: it is none.
    """
    if row.fault is not None:
        raise SampleFault(row.fault)
    if not isinstance(row.value, bytes):
        return row.value
    try:
        text = row.value.decode("utf-8-sig" if row.line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise SampleFault("not UTF-8; convert the file with `iconv`") from error
    return parse_json(text, changed)


def read_rows(
    source: Source, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[Row]:
    """Yield the rows of a source; whatever is wrong is a row with a fault, never an error.

    Args:
        source: a file or a data set of the hub.
        on_bytes: called with numbers of bytes that sum up to the file's, for a progress display.
    """
    if source.hub is not None:
        from ms4.data.tables import hub_rows

        yield from hub_rows(source.hub)
        return
    seen = False
    try:
        for row in _file_rows(source.path, on_bytes):
            seen = True
            yield row
    except FileNotFoundError:
        what = "a pattern that no file matches" if is_pattern(source.name) else "no such file"
        yield _of_file(f"{what}; correct its name (in a project: data.train or data.test)")
    except IsADirectoryError:
        yield _of_file("a directory; name the files in it, by a pattern perhaps")
    except UnicodeEncodeError:
        yield _of_file(f"a name that this locale ({_LOCALE}) cannot write; set LC_ALL=C.UTF-8")
    except OSError as error:
        yield _of_file(f"cannot be read ({error.strerror or error}); correct it")
    else:
        if not seen:
            yield _of_file("holds no samples; leave it out")


def _of_file(fault: str) -> Row:
    return Row(None, None, fault, records=0, ends=True)


def _file_rows(path: Path, on_bytes: Callable[[int], None]) -> Iterator[Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    suffix = (suffixes[-2:-1] if packed else suffixes[-1:] or [""]) or [""]
    if path.name == FAULTS_FILE:
        yield _of_file("what `ms4 data` wrote about data, and no data; remove it from the files")
        return
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        # Not opened: a pipe may never be written to, and a device never ends.
        what = next((name for test, name in _NO_FILES if test(mode)), "a device")
        yield _of_file(f"{what}, which cannot be read twice; write its content to a file")
        return
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")) or suffix[0] in (
            ".parquet",
            ".arrow",
            ".feather",
        ):
            from ms4.data.tables import table_rows

            yield from table_rows(path, file)
            on_bytes(path.stat().st_size)
            return
        utf = next((name for name, marks in _OTHER_UTF.items() if head.startswith(marks)), None)
        if utf is not None:
            yield _of_file(f"{utf}; convert it to UTF-8 with `iconv -f {utf} -t UTF-8`")
            return
        other = next((name for mark, name in _OTHER_PACKED.items() if head.startswith(mark)), None)
        if other is not None:
            yield _of_file(f"compressed by {other}, which is not read; unpack it, or use gzip")
            return
        stream: IO[bytes] = file
        if head.startswith(_GZIP):
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=file))
        elif head.startswith(_ZSTD):
            from ms4.data.tables import zstd_stream

            stream = zstd_stream(file)
        elif packed and head:
            yield _of_file(f"named {suffixes[-1]}, but is not compressed so; rename it")
            return
        done = 0
        for number, row in enumerate(_text_rows(stream, suffix[0])):
            yield row
            if number % 64 == 0:
                position = file.tell()
                on_bytes(position - done)
                done = position
        on_bytes(path.stat().st_size - done)


class _Peeked:
    """A stream whose first bytes are looked at before it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._waiting = b""

    def peek(self, size: int) -> bytes:
        """The first bytes, which will be read again."""
        while len(self._waiting) < size and (more := self._stream.read(size - len(self._waiting))):
            self._waiting += more
        return self._waiting

    def stream(self) -> IO[bytes]:
        """All of it from the beginning."""
        return io.BufferedReader(_Chained(self._waiting, self._stream), 1 << 16)


class _Chained(io.RawIOBase):
    def __init__(self, first: bytes, rest: IO[bytes]) -> None:
        self._first, self._rest = first, rest

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data, self._first = self._first[: len(target)], self._first[len(target) :]
        data = data or self._rest.read(len(target))
        target[: len(data)] = data
        return len(data)


def _text_rows(stream: IO[bytes], suffix: str) -> Iterator[Row]:
    line = 0
    try:
        peeked = _Peeked(stream)
        head = peeked.peek(1 << 16)
        whole = peeked.stream()
        if suffix in _TABLES:
            rows = _table_rows(whole, _TABLES[suffix])
        elif suffix in _TEXT_SUFFIXES:
            rows = _plain_rows(whole)
        elif _is_stream_of_values(head, suffix):
            if head.startswith(b"\xef\xbb\xbf"):
                whole.read(3)
            rows = _value_rows(whole)
        else:
            rows = _line_rows(whole)
        for row in rows:
            line = row.line or line
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Row(line + 1, None, f"{_INTERRUPTED} ({error})", records=0, ends=True)


def _is_stream_of_values(head: bytes, suffix: str) -> bool:
    """Whether a file is a list, or an object over several lines, and not one object a line."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return True
    first = text.split(b"\n", 1)[0].strip()
    return text.startswith(b"{") and (first == b"{" or (suffix == ".json" and b"}" not in first))


def _line_rows(stream: IO[bytes]) -> Iterator[Row]:
    for number in itertools.count(1):
        raw = stream.readline(MAX_RECORD + 1)
        if not raw:
            return
        if len(raw) > MAX_RECORD:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_RECORD)
            yield Row(number, None, f"a line of more than {MAX_RECORD >> 20} MiB; shorten it")
            continue
        if raw.removeprefix(b"\xef\xbb\xbf").strip():
            yield Row(number, raw)


def _value_rows(stream: IO[bytes]) -> Iterator[Row]:
    try:
        for line, piece in split_values(stream):
            yield Row(line, piece)
    except Unfinished:
        yield _of_file("ends before its list does: it may be cut off; copy it again, or add `]`")
    except SampleFault as fault:
        yield _of_file(str(fault))


def _plain_rows(stream: IO[bytes]) -> Iterator[Row]:
    raw = stream.read(MAX_RECORD + 1)
    if len(raw) > MAX_RECORD:
        yield Row(1, None, f"a text of more than {MAX_RECORD >> 20} MiB; split the file")
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Row(1, None, "not UTF-8; convert the file with `iconv`")
        return
    if text.strip():
        yield Row(1, {"text": text})


class _TooLargeError(Exception):
    """A row that would fill the memory: what is too large, and what to do."""


class _Lines:
    """The lines of a table, as long as those of one row are not too much."""

    def __init__(self, text: IO[str], delimiter: str) -> None:
        self._text, self._delimiter = text, delimiter
        self.begin_row()

    def begin_row(self) -> None:
        """Count anew: the next line is another row's."""
        self._characters = self._cells = 0

    def __iter__(self) -> Iterator[str]:
        """Yield them.

        Raises:
            _TooLargeError: a row is longer than a record may be, or has too many cells.
        """
        while line := self._text.readline(MAX_RECORD + 1):
            self._characters += len(line)
            self._cells += line.count(self._delimiter)
            if self._characters > MAX_RECORD:
                raise _TooLargeError(f"a row of more than {MAX_RECORD >> 20} MiB")
            if self._cells > MAX_CELLS:  # an object each, of many times the bytes
                raise _TooLargeError(f"a row of more than {MAX_CELLS:,} cells")
            yield line


def _table_rows(stream: IO[bytes], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_RECORD)
    # Bytes that are not UTF-8 become surrogates, so that their row, and no other, is refused.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    lines = _Lines(text, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _TooLargeError as large:
            fault = f"{large}: the file is broken; correct it"
            yield Row(line, None, fault, records=0, ends=True)
            return
        except csv.Error as error:
            # A quote that nothing closes takes all that follows with it.
            ends = header is None or "end of data" in str(error)
            fault = f"not a row of the table ({error}); correct its quotes"
            yield Row(line, None, fault, records=0 if ends else 1, ends=ends)
            if ends:
                return
            continue
        if not cells:
            continue
        if any("\udc80" <= c <= "\udcff" for cell in cells for c in cell):
            yield Row(
                line,
                None,
                "not UTF-8; convert the file with `iconv`",
                records=0 if header is None else 1,
                ends=header is None,
            )
            if header is None:  # the next row would be taken for the names of the columns
                return
        elif header is None:
            header = [cell.strip() for cell in cells]
            other = next((d for d in ";\t|," if len(header) == 1 and d in header[0]), None)
            if other is not None:
                between = {"\t": "tabs", ",": "commas"}
                yield _of_file(
                    f"its columns stand between {between.get(other, f'`{other}`')}; save it with "
                    f"{between[delimiter]} between them"
                )
                return
            if len(set(header)) < len(header) or "" in header:
                yield _of_file(
                    "its first row must name the columns, each differently; add the names"
                )
                return
        elif len(cells) != len(header):
            yield Row(
                line,
                None,
                f"{count(len(cells), 'cell')}, but the table has {count(len(header), 'column')}; "
                "correct its quotes or delimiters",
            )
        else:
            yield Row(line, dict(zip(header, cells, strict=True)))
