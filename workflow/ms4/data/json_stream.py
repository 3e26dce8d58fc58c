"""JSON texts that stand in one file, one after another or as a list, without reading all of it.

The cuts are found by brackets and quotes alone; whether a piece is JSON, its parser says. A broken
piece takes as little as possible with it: a bracket that does not fit closes those inside it, and a
line break ends a string, which JSON does not allow in one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO

from ms4.data.faults import SampleFault

CHUNK = 1 << 20
MAX_RECORD = 64 << 20
"""Bytes of a record at most: what is longer is no record but a broken file."""
MAX_DEPTH = 10_000
"""Brackets inside one another at most: Python's parser takes fewer."""

_NEXT = re.compile(rb'[\[\]{},"]')
_IN_STRING = re.compile(rb'(?:[^"\\\n]|\\[^\n])*+')
_CLOSES = {ord("}"): ord("{"), ord("]"): ord("[")}
_COMMA, _QUOTE, _BACKSLASH, _LIST, _END_OF_LIST = b',"\\[]'


class Unfinished(Exception):
    """The file ends inside a list: it may be cut off."""


def split_values(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield line (from 1) and bytes of each value: of each element, where a value is a list.

    Raises:
        Unfinished: after the last value, if the list does not end.
        SampleFault: a value is longer than `MAX_RECORD`, or nested deeper than `MAX_DEPTH`; nothing
            after it can be told apart.
        OSError, EOFError: reading fails.
    """
    return _Splitter(stream).values()


class _Splitter:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._buffer = b""
        self._start = 0  # of the value that is looked at
        self._line = 1  # of that place
        self._open: list[tuple[int, int]] = []  # brackets, and where they stand in the file
        self._count = dict.fromkeys(_CLOSES.values(), 0)  # of each in `_open`
        self._passed = 0  # bytes of the file before the buffer
        self._base = 0  # 1 inside a list of values

    def values(self) -> Iterator[tuple[int, bytes]]:
        at, in_string = 0, False
        while chunk := self._stream.read(CHUNK):
            shift, self._start = self._start, 0
            self._buffer, at = self._buffer[shift:] + chunk, at - shift
            self._passed += shift
            if len(self._buffer) > MAX_RECORD + CHUNK:
                raise SampleFault(
                    f"line {self._first_line(self._buffer)}: a record of more than "
                    f"{MAX_RECORD >> 20} MiB; the file is broken there, or is no data: correct it"
                )
            buffer, size = self._buffer, len(self._buffer)
            while True:
                if in_string:
                    found = _IN_STRING.match(buffer, at)
                    at = found.end() if found else at
                    if at == size or (at == size - 1 and buffer[at] == _BACKSLASH):
                        break  # the string, or its last escape, goes on in the next chunk
                    at, in_string = at + 1, False
                    if buffer[at - 1] != _QUOTE:
                        yield from self._broken_string(at)
                step = _NEXT.search(buffer, at)
                if step is None:
                    at = size
                    break
                at = step.end()
                in_string = buffer[at - 1] == _QUOTE
                if not in_string:
                    yield from self._bracket(buffer[at - 1], at)
        yield from self._cut(len(self._buffer), len(self._buffer))
        if self._base:
            raise Unfinished

    def _bracket(self, byte: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Take a bracket or comma that ends at `end`."""
        depth = len(self._open)
        if byte == _COMMA:
            if depth == self._base:
                yield from self._cut(end - 1, end)
        elif byte not in _CLOSES:
            if depth == 0 and byte == _LIST:
                yield from self._cut(end - 1, end)
                self._base = 1
            elif depth == 0:  # an object that follows something: that is a value of its own
                yield from self._cut(end - 1, end - 1)
            self._open.append((byte, self._passed + end - 1))
            self._count[byte] += 1
            if depth == MAX_DEPTH:
                line = self._line + self._buffer.count(b"\n", self._start, end)
                raise SampleFault(
                    f"line {line}: more than {MAX_DEPTH:,} brackets inside one another; the file "
                    "is broken there, or is no data: correct it"
                )
        # The list that holds the values is no bracket of theirs.
        elif self._count[_CLOSES[byte]] > (self._base and byte == _END_OF_LIST):
            while self._pop() != _CLOSES[byte]:
                pass
            if not self._open:
                yield from self._cut(end, end)
        elif self._base and byte == _END_OF_LIST:
            yield from self._cut(end - 1, end)
            self._base = 0
            while self._open:
                self._pop()

    def _pop(self) -> int:
        """Take the innermost open bracket."""
        byte, _ = self._open.pop()
        self._count[byte] -= 1
        return byte

    def _broken_string(self, end: int) -> Iterator[tuple[int, bytes]]:
        """A line ends inside a string: its brackets are closed in what the string swallowed."""
        line_start = self._passed + self._buffer.rfind(b"\n", 0, end - 1)
        depth = len(self._open)
        while len(self._open) > self._base and self._open[-1][1] > line_start:
            self._pop()
        if len(self._open) == self._base and depth > self._base:
            yield from self._cut(end, end)

    def _cut(self, end: int, after: int) -> Iterator[tuple[int, bytes]]:
        """The value up to `end`, unless it is only white space; the next begins at `after`."""
        piece = self._buffer[self._start : end]
        if piece.strip():
            yield self._first_line(piece), piece.strip()
        self._line += self._buffer.count(b"\n", self._start, after)
        self._start = after

    def _first_line(self, piece: bytes) -> int:
        return self._line + piece.count(b"\n", 0, len(piece) - len(piece.lstrip()))
