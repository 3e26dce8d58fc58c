"""Milliseconds from a key stroke on a planning screen until the terminal has the changed screen.

The wizard runs on a terminal of 80 × 24, under the plan of the full-size model. Each key changes
what is on the screen, so an answer is the first output after the key was written; the time until
the last output, with the plan redrawn, is taken beside it."""

from __future__ import annotations

import os
import select
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import on_a_terminal, record

ROUNDS = 12
QUIET_S = 0.25
"""So long without output, and the screen is at rest."""
SHARE, LIMIT_MS = 0.95, 50
CLAIM = "95 % of key strokes on the planning screens are answered within 50 ms."
UP, DOWN, BACKSPACE, NEXT, TAB = b"\x1b[A", b"\x1b[B", b"\x7f", b"\x0e", b"\t"
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
        self.process, self._leader = on_a_terminal(command, place)
        self.seen = b""

    def output(self, seconds: float) -> bytes:
        """What comes within some seconds, as soon as anything comes."""
        if not select.select([self._leader], [], [], seconds)[0]:
            return b""
        got = os.read(self._leader, 1 << 20)
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
        os.write(self._leader, key)
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
            os.write(self._leader, NEXT)
            self.output(10)
            self.rest()
        sys.exit(f"Next does not lead to {title!r}")

    def close(self) -> None:
        """End it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._leader)


def quantile(values: list[float], share: float) -> float:
    """The value that a share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Press each screen's keys some times, and record."""
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
    result = {
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
    record("keystrokes", CLAIM, result)


if __name__ == "__main__":
    main()
