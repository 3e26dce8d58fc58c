"""Failures that may pass: how long they are waited out, and how long a hub that asks for it is left
alone."""

from __future__ import annotations

import threading
import time

from huggingface_hub import constants

from ms4.errors import Ms4Error
from ms4.weights.meter import say

PAUSES_S = (0.5, 1.0, 2.0)
"""Seconds before each further try after a failure that may pass."""
PATIENCE_S = 20.0
"""No further try that could end more than so many seconds after the first of a row of failures."""
PROGRESS = 1 << 18
"""Bytes that must come for a row of failures to be over: a trickle is no progress."""
LEAST_RATE = 1000.0
"""Bytes per second: a server that sends less has stalled, as one that is silent has. The slowest
line that would ever bring 121 GB is a thousand times faster."""
TRICKLE_S = 60.0
"""Seconds that a server may send less before it counts as stalled."""
MAX_WAITS = 3
"""How many times in a row the hub may ask for a wait (429 with Retry-After)."""
MAX_WAIT_S = 300.0
"""Seconds; a longer wait than this that the hub asks for is an error."""

GO_ON = "What was fetched is kept: the same command goes on from there."


class Halted(Exception):
    """A fetch was told to stop; its partial file stays."""


class Passing(Exception):
    """A failure that may be gone at the next try."""

    def __init__(
        self, message: str, retry_after_s: float | None = None, lasted_s: float = 0.0
    ) -> None:
        """`lasted_s` is the time that it took to be taken for one, which tries no patience."""
        super().__init__(message)
        self.retry_after_s, self.lasted_s = retry_after_s, lasted_s


class Pace:
    """Watches one answer: whether bytes come at all fast, over `TRICKLE_S` at a time."""

    def __init__(self, who: str, what: str) -> None:
        """`who` sends `what`, for the message."""
        self._who, self._what = who, what
        self._since_s, self._came = time.monotonic(), 0

    def add(self, size: int) -> None:
        """So many bytes came just now.

        Raises:
            Passing: they trickle.
        """
        self._came += size
        lasted_s = time.monotonic() - self._since_s
        if lasted_s < TRICKLE_S:
            return
        if self._came < LEAST_RATE * lasted_s:
            raise Passing(
                f"{self._who} stalled: {self._came} bytes of {self._what} in {lasted_s:.0f} s",
                lasted_s=lasted_s,
            )
        self._since_s, self._came = time.monotonic(), 0


class Gate:
    """Holds all threads back from asking a hub for as long as it told one of them to wait."""

    def __init__(self) -> None:
        self._opens_s = 0.0

    def close(self, seconds: float) -> None:
        """Let nobody pass for so long."""
        self._opens_s = max(self._opens_s, time.monotonic() + seconds)

    def wait(self, halt: threading.Event) -> None:
        """Wait until it is open, or raise Halted."""
        while True:
            left = self._opens_s - time.monotonic()
            _pause(max(left, 0.0), halt)
            if left <= 0:
                return


def _pause(seconds: float, halt: threading.Event) -> None:
    if halt.wait(seconds):
        raise Halted


class Patience:
    """Bounds a row of failed tries for one file, in number and in time."""

    def __init__(self, gate: Gate, halt: threading.Event) -> None:
        self._gate, self._halt = gate, halt
        self._failures = self._waits = 0
        self._first_s: float | None = None
        self._mark = 0

    def reached(self, size: int) -> None:
        """The partial file has `size` bytes: with enough more than ever before, a row is over."""
        if size >= self._mark + PROGRESS:
            self._mark = size
            self._failures = self._waits = 0
            self._first_s = None

    def wait(self, failure: Passing) -> None:
        """Sleep before the next try, or raise Ms4Error if there should be none."""
        wait_s = failure.retry_after_s
        if wait_s is not None:
            if wait_s > MAX_WAIT_S or self._waits == MAX_WAITS:
                raise Ms4Error(
                    f"{failure}, and asks to wait {wait_s:.0f} s more. Run again later. {GO_ON}"
                ) from failure
            self._waits += 1
            say(f"{failure}; waiting {wait_s:.0f} s, as it asks")
            self._gate.close(wait_s)
            return
        if self._first_s is None:
            self._first_s = time.monotonic()
        else:
            self._first_s += failure.lasted_s
        ends_s = time.monotonic() - self._first_s + constants.HF_HUB_DOWNLOAD_TIMEOUT
        if self._failures == len(PAUSES_S) or ends_s > PATIENCE_S:
            raise Ms4Error(f"{failure} ({self._failures + 1} tries). {GO_ON}") from failure
        _pause(PAUSES_S[self._failures], self._halt)
        self._failures += 1
