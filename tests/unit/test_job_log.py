"""What of a stage's output its log keeps."""

from __future__ import annotations

import io
import sys

import pytest

from ms4.cli import _logged, _Tee
from ms4.errors import Ms4Error


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


def test_a_log_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").write_text("a file in its place")
    with (
        pytest.raises(Ms4Error, match=r"logs/plan\.log: cannot be written \(.+\); make"),
        _logged("plan"),
    ):
        raise AssertionError("the stage began")


def test_odd_bytes_of_a_name_do_not_end_a_stage(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with _logged("plan"):
        print("a\udcffb")
    assert (tmp_path / "logs/plan.log").read_text() == "a\\udcffb\n"
