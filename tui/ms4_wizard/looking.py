"""The look at the training data that goes on beside the screens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ms4_wizard.answers import Answers
from ms4_wizard.speed import Size

LONGEST = 1_048_576
"""Sequence length that the data is looked at with: no sample is refused for its length."""
_LINE_BYTES = 1 << 26


@dataclass
class Look:
    """What is known of the data so far."""

    state: Literal["reading", "done", "cancelled", "failed"] = "reading"
    size: int = 0
    """Bytes of the local files."""
    done: int = 0
    """Bytes that were read."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """The first samples, in pieces: text, whether it is trained, whether it is a control token."""
    found: dict[str, Any] = field(default_factory=dict)
    """What `ms4 data --json` prints; empty until all was read."""
    error: str = ""

    @property
    def amount(self) -> Size | None:
        """How much there is to train on; None until all was read, or if nothing can be used."""
        if not self.found or not self.found["samples"]:
            return None
        lengths = self.found["lengths"]
        return Size(self.found["samples"], self.found["tokens"], lengths["longest"])


class Looker:
    """Looks at the data of the answers, in a process of its own, one look at a time."""

    def __init__(self) -> None:
        self.look: Look | None = None
        """The latest; None before the first."""
        self._key = ""
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, answers: Answers, told: Callable[[], None], again: bool = False) -> None:
        """Begin to look, unless these data were looked at or are being looked at.

        Args:
            answers: what to look at, and how it is read.
            told: called when more is known.
            again: begin even so.
        """
        data = answers.data.model_dump(mode="json")
        # Neither held-out samples, nor the packing, nor what becomes of faults changes it; and
        # whether images are to be trained with is asked when it is known that there are some.
        data |= {"sequence_length": LONGEST, "test": {}, "holdout": 0.0, "faulty": "error"}
        data |= {"modality": "text_vision"}
        # The tiny model has a tokenizer of its own.
        wanted = {"data": data, "model": {"source": answers.model.source}}
        key = json.dumps(wanted, sort_keys=True)
        if key == self._key and not again:
            return
        self.cancel()
        self._key = key
        look = self.look = Look()
        self._task = asyncio.get_running_loop().create_task(self._read(look, wanted, told))

    def refuse(self, why: str) -> None:
        """These data cannot be looked at, and what was known is of others."""
        self.cancel()
        self.look = Look("failed", error=why)

    async def _read(self, look: Look, wanted: dict[str, Any], told: Callable[[], None]) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "ms4_wizard.analyse",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # it has processes of its own, which end with it
            limit=_LINE_BYTES,
        )
        self._process = process
        if look.state != "reading":
            self._kill()
        told()
        assert process.stdin is not None  # noqa: S101 - pipes were asked for
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        errors = asyncio.get_running_loop().create_task(process.stderr.read())
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(wanted).encode())
            process.stdin.close()
        async for line in process.stdout:
            with contextlib.suppress(ValueError):  # it was killed in the middle of a line
                _take(look, json.loads(line))
            told()
        await process.wait()
        if look.state == "reading":
            look.state = "failed"
            words = (await errors).decode(errors="replace").strip().splitlines()
            look.error = words[-1] if words else f"it ended with code {process.returncode}"
            told()

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def cancel(self) -> None:
        """Stop looking; what is known stays."""
        if self.look is not None and self.look.state == "reading":
            self.look.state = "cancelled"
        self._kill()
        self._key = ""

    async def close(self) -> None:
        """Stop looking, and wait until the process is gone: its pipes belong to this loop."""
        self.cancel()
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


def _take(look: Look, told: dict[str, Any]) -> None:
    if look.state == "cancelled":
        return
    look.size = told.get("size", look.size)
    look.done = told.get("bytes", look.done)
    if "sample" in told:
        look.samples.append(told["sample"])
    if "error" in told:
        look.state, look.error = "failed", told["error"]
    if "found" in told:
        look.state, look.found = "done", told["found"]
