"""Following a text file that another process writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class Follower:
    """Gives the lines that came since the last time; half a line waits for its rest."""

    def __init__(self, path: Path, most: int = 1 << 16) -> None:
        """
        Args:
            path: of the file, which need not be there.
            most: bytes that are read at once, at most; of a file that is longer, the last ones.
        """
        self.path = path
        self._most = most
        self._file: tuple[int, int] | None = None
        """Device and inode: a file that was replaced has another."""
        self._offset = 0
        self._half = b""

    def read(self) -> tuple[list[str], bool]:
        """New lines, and whether they begin anew: the file was replaced, cut or removed."""
        try:
            with self.path.open("rb") as file:
                return self._read_from(file)
        except OSError:
            gone = self._file is not None
            self._file, self._offset, self._half = None, 0, b""
            return [], gone

    def _read_from(self, file: BinaryIO) -> tuple[list[str], bool]:
        status = os.fstat(file.fileno())
        now = status.st_dev, status.st_ino
        anew = self._file is not None and (now != self._file or status.st_size < self._offset)
        if anew or self._file is None:
            self._file, self._offset, self._half = now, 0, b""
        skipped = status.st_size - self._offset > self._most
        if skipped:
            self._offset, self._half = status.st_size - self._most, b""
        file.seek(self._offset)
        new = file.read(self._most)
        self._offset += len(new)
        *lines, self._half = (self._half + new).split(b"\n")
        if skipped and lines:
            del lines[0]  # its beginning was passed over
        return [line.decode("utf-8", errors="replace") for line in lines], anew
