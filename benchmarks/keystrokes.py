"""Milliseconds from a key stroke on a planning screen until the terminal has the changed screen.

The wizard runs on a terminal of 80 × 24, under the plan of the full-size model. Each key changes
what is on the screen, so an answer is the first output after the key was written; the time until
the last output, with the plan redrawn, is taken beside it.

    python benchmarks/keystrokes.py [--data-mib N]

With N, conversations of so many MiB are made of GSM8K (MS4_TEST_DATA names the directory that holds
gsm8k/train.jsonl), and keys are pressed on the data's screen while they are analysed: a letter that
no other text of the screen holds, until the terminal has it. Then the analysis is cancelled, and
the time is taken until its processes are gone."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from common import on_a_terminal, record, spread

ROUNDS = 12
QUIET_S = 0.25
"""So long without output, and the screen is at rest."""
SHARE, LIMIT_MS = 0.95, 50
CLAIM = "95 % of key strokes on the planning screens are answered within 50 ms."
DATA_CLAIM = (
    "95 % of key strokes on the data's screen are answered within 50 ms while a large file is "
    "analysed; its progress advances, and cancelling it takes effect at once."
)
LETTERS = "ßðþæøåœłđħŋŧĸŀĺŕśźżč"
"""In no text of the screen: where one comes back, its key was answered."""
LINES = 10
PACE_S = 0.1
"""Between two letters."""
UP, DOWN, BACKSPACE, NEXT, TAB = b"\x1b[A", b"\x1b[B", b"\x7f", b"\x0e", b"\t"
CANCEL, CLEAR = b"\x18", b"\x15"
SCREENS: tuple[tuple[str, bytes, list[bytes]], ...] = (
    ("memory", b"6 of 1", [b"8", b"0", BACKSPACE, BACKSPACE]),
    ("experts", b"", [DOWN, b" ", UP, b" "]),
    ("adapters", b"7 of 1", [DOWN, b" ", b" ", UP]),
    ("rank", b"", [BACKSPACE, b"4", BACKSPACE, b"2"]),
    ("training", b"8 of 1", [BACKSPACE, b"6", BACKSPACE, b"8"]),
)
"""Name, what its title holds (empty: the next control of the same screen), and keys that leave it
as it was."""


class Terminal:
    """The wizard on a terminal."""

    def __init__(self, place: Path) -> None:
        settings = ("data.train=train.jsonl", "run.device=cuda", "run.memory_gib=80")
        command = [sys.executable, "-m", "ms4_wizard", "project"]
        command += [word for setting in settings for word in ("--set", setting)]
        self.process, self.leader = on_a_terminal(command, place)
        self.seen = b""

    def output(self, seconds: float) -> bytes:
        """What comes within some seconds, as soon as anything comes."""
        if not select.select([self.leader], [], [], seconds)[0]:
            return b""
        got = os.read(self.leader, 1 << 20)
        self.seen += got
        return got

    def rest(self) -> float:
        """Wait until nothing comes any more; when the last output came."""
        last = time.perf_counter()
        while self.output(QUIET_S):
            last = time.perf_counter()
        return last

    def press(self, key: bytes) -> tuple[float, float]:
        """Press a key; milliseconds until the first and until the last output."""
        started = time.perf_counter()
        os.write(self.leader, key)
        if not self.output(10):
            sys.exit(f"no answer to {key!r}; the screen got {self.seen[-2000:]!r}")
        first = time.perf_counter()
        return (first - started) * 1e3, (max(first, self.rest()) - started) * 1e3

    def until(self, text: bytes) -> None:
        """Wait until the title holds a text, and the screen is at rest."""
        end = time.monotonic() + 60
        while text not in self.seen:
            if time.monotonic() > end:
                sys.exit(f"no {text!r}; the screen got {self.seen[-2000:]!r}")
            self.output(1)
        self.rest()

    def go_to(self, title: bytes) -> None:
        """Press Next until a title is there."""
        for _ in range(12):
            if title in self.seen:
                return
            self.seen = b""
            os.write(self.leader, NEXT)
            self.output(10)
            self.rest()
        sys.exit(f"Next does not lead to {title!r}")

    def answered(self, key: bytes, text: bytes) -> float:
        """Press a key; milliseconds until a text comes."""
        started, self.seen = time.perf_counter(), b""
        os.write(self.leader, key)
        while text not in self.seen:
            if time.perf_counter() - started > 10:
                sys.exit(f"no answer to {key!r}; the screen got {self.seen[-2000:]!r}")
            self.output(1)
        return (time.perf_counter() - started) * 1e3

    def comes(self, text: bytes, seconds: float) -> float:
        """Wait for a text from now on; seconds that it took."""
        started, self.seen = time.perf_counter(), b""
        while text not in self.seen:
            if time.perf_counter() - started > seconds:
                sys.exit(f"no {text!r}; the screen got {self.seen[-2000:]!r}")
            self.output(1)
        return time.perf_counter() - started

    def close(self) -> None:
        """End it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.leader)


def quantile(values: list[float], share: float) -> float:
    """The value that a share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def conversations(target: Path, mib: int) -> None:
    """GSM8K as conversations with thinking, over and over, each with a number of its own."""
    source = Path(os.environ["MS4_TEST_DATA"]) / "gsm8k/train.jsonl"
    problems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    number, size = 0, 0
    with target.open("w", encoding="utf-8") as file:
        while size < mib << 20:
            for problem in problems:
                number += 1
                thinking, reply = problem["answer"].rsplit("####", 1)
                parts = [
                    {"type": "thinking", "thinking": f"{number}: {thinking.strip()}"},
                    {"type": "text", "text": reply.strip()},
                ]
                messages = [
                    {"role": "user", "content": f"Problem {number}. {problem['question']}"},
                    {"role": "assistant", "content": parts},
                ]
                size += file.write(json.dumps({"messages": messages}) + "\n")


def analysing(process: int) -> list[psutil.Process]:
    """The processes that analyse the data, and live."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process).children(recursive=True)
        return [one for one in below if one.status() != psutil.STATUS_ZOMBIE]
    return []


def type_letters(terminal: Terminal) -> tuple[list[float], bytes]:
    """Type at the pace of a fast typist; milliseconds to the echo of each, and all output."""
    times, seen = [], b""
    for letter in LETTERS * LINES:
        times.append(terminal.answered(letter.encode(), letter.encode()))
        seen += terminal.seen
        if letter == LETTERS[-1]:
            os.write(terminal.leader, CLEAR)
        end = time.perf_counter() + (0.5 if letter == LETTERS[-1] else PACE_S)
        terminal.seen = b""
        while (left := end - time.perf_counter()) > 0:
            terminal.output(left)
        seen += terminal.seen
    return times, seen


def with_data(mib: int) -> dict[str, Any]:
    """Keys while a file is analysed, and cancelling that."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        conversations(place / "train.jsonl", mib)
        terminal = Terminal(place)
        try:
            terminal.until(b"of 11")
            terminal.seen = b""
            os.write(terminal.leader, NEXT)
            terminal.comes(b"% of ", 60)
            if not analysing(terminal.process.pid):
                sys.exit("nothing analyses the data")
            times, seen = type_letters(terminal)
            if not analysing(terminal.process.pid):
                sys.exit(f"{mib} MiB are analysed before all keys are pressed: take more")
            started = time.perf_counter()
            os.write(terminal.leader, CANCEL)
            terminal.comes(b"Cancelled", 10)
            shown = time.perf_counter() - started
            while analysing(terminal.process.pid):
                time.sleep(0.002)
            gone = time.perf_counter() - started
            alone, _ = type_letters(terminal)
        finally:
            terminal.close()
    told = {int(share) for share in re.findall(rb"(\d+)% of ", seen)}
    return {
        "claim": DATA_CLAIM,
        "mib": mib,
        "key_strokes": len(times),
        "within_50_ms": round(sum(t <= LIMIT_MS for t in times) / len(times), 3),
        "holds": quantile(times, SHARE) <= LIMIT_MS,
        "milliseconds": spread(times, 1) | {"p95": round(quantile(times, SHARE), 1)},
        "milliseconds_without_analysis": spread(alone, 1)
        | {"p95": round(quantile(alone, SHARE), 1)},
        "percent_told_meanwhile": sorted(told),
        "milliseconds_until_cancelled_is_shown": round(shown * 1e3, 1),
        "milliseconds_until_its_processes_are_gone": round(gone * 1e3, 1),
    }


def main() -> None:
    """Press each screen's keys some times, and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-mib", type=int, default=0, metavar="N")
    mib = parser.parse_args().data_mib
    times: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        line = '{"messages": [{"role": "user", "content": "a"}, '
        line += '{"role": "assistant", "content": "b"}]}\n'
        (place / "train.jsonl").write_text(line)
        terminal = Terminal(place)
        try:
            terminal.until(b"of 11")
            for screen, title, keys in SCREENS:
                if title:
                    terminal.go_to(title)
                else:
                    terminal.press(TAB)
                found = [terminal.press(key) for _ in range(ROUNDS) for key in keys]
                times[screen] = found[len(keys) :]  # the first round warms up
        finally:
            terminal.close()
    firsts = [first for found in times.values() for first, _ in found]
    result: dict[str, Any] = {
        "key_strokes": len(firsts),
        "within_50_ms": round(sum(t <= LIMIT_MS for t in firsts) / len(firsts), 3),
        "holds": quantile(firsts, SHARE) <= LIMIT_MS,
        "milliseconds_to_first_output": {
            "median": round(statistics.median(firsts), 1),
            "p95": round(quantile(firsts, SHARE), 1),
            "max": round(max(firsts), 1),
        },
        "by_screen_p95": {
            screen: {
                "first_output": round(quantile([f for f, _ in found], SHARE), 1),
                "last_output": round(quantile([last for _, last in found], SHARE), 1),
            }
            for screen, found in times.items()
        },
        "load_average": os.getloadavg()[0],
    }
    if mib:
        result["while_data_is_analysed"] = with_data(mib)
    record("keystrokes", CLAIM, result)


if __name__ == "__main__":
    main()
