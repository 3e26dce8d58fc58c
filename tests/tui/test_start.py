"""What the first frame waits for, and what it does not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ms4 import device
from ms4_wizard import costs
from ms4_wizard.app import WizardApp
from ms4_wizard.draft import Draft
from ms4_wizard.flow import Flow
from ms4_wizard.screens.machine import MachineScreen
from ms4_wizard.screens.welcome import WelcomeScreen
from tests.tui.driving import until

SLOW = ("pydantic", "yaml", "psutil", "numpy", "ms4.config", "ms4.plan", "huggingface_hub")
PROOF = """
import sys
from ms4_wizard import cli
from ms4_wizard.app import WizardApp

def say(app):
    found = sorted(name for name in sys.argv[1:] if name in sys.modules)
    app.exit([f"drawn, with {found}"])

WizardApp.prepare = say  # what is called as soon as the first frame is drawn
sys.exit(cli.main([]))
"""


def test_nothing_of_the_configuration_is_loaded_before_the_first_frame(place: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "XDG_STATE_HOME": str(place), "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-c", PROOF, *SLOW],
        cwd=place,
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=subprocess.STDOUT,
    ) as process:
        os.close(follower)
        seen = b""
        try:
            while got := os.read(leader, 65536):
                seen += got
        except OSError:  # it ended, and the terminal with it
            pass
    os.close(leader)
    assert b"New project" in seen
    assert b"drawn, with []" in seen, seen[-500:]
    assert process.returncode == 0


def test_the_session_is_made_when_the_first_screen_is_left(place: Path) -> None:
    made: list[Flow] = []

    def make() -> Flow:
        made.append(Flow(Draft({}), Path("project")))
        return made[-1]

    async def how() -> None:
        app = WizardApp(make, welcome=True)
        async with app.run_test(size=(80, 24)) as pilot:
            assert isinstance(app.screen, WelcomeScreen)
            await app.workers.wait_for_complete()
            assert made == []
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, MachineScreen))
            assert made == [app.flow]

    asyncio.run(how())


def test_nvidia_smi_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho asked >> {tmp_path}/asked\necho "143771, NVIDIA H200"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for found in (costs._gpu, costs._look):
        found.cache_clear()
    try:
        costs.look_at_the_machine()
        answers = [costs._look(wanted, False) for wanted in ("auto", "cuda", "cpu")]
        kinds = [x.kind for x in answers if isinstance(x, device.Device)]
        assert kinds == ["cuda", "cuda", "cpu"]
        assert (tmp_path / "asked").read_text().splitlines() == ["asked"]
    finally:
        for found in (costs._gpu, costs._look):
            found.cache_clear()
