"""What of a stage's output its log keeps."""

from __future__ import annotations

import io

import pytest

from ms4.cli import _Tee


@pytest.mark.parametrize(
    ("written", "log"),
    [
        (["one\n", "two\n"], "one\ntwo\n"),
        (["half", " a line\n"], "half a line\n"),
        (["\r\x1b[2Ktrain 1/3", "\r\x1b[2Ktrain 2/3", "\r\x1b[2Ktrain 3/3\n", "done\n"],
         "train 3/3\ndone\n"),
        (["dos\r", "\n"], "dos\n"),
        (["no end"], "no end\n"),
    ],
)  # fmt: skip
def test_lines_and_the_last_state_of_bars(written: list[str], log: str) -> None:
    stream, file = io.StringIO(), io.StringIO()
    tee = _Tee(stream, file)
    for text in written:
        tee.write(text)
    tee.end()
    assert file.getvalue() == log
    assert stream.getvalue() == "".join(written), "the terminal gets it as it is"
