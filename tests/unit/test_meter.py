"""Progress over bytes where there is no terminal: what a line says, and how often there is one."""

from __future__ import annotations

import pytest

from ms4.weights import meter


def test_a_line_has_the_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects the rate and the minutes left in a log: of what came in this run, and not of what
    was there before."""
    now = 100.0
    monkeypatch.setattr(meter.time, "monotonic", lambda: now)
    with meter.Meter("fetched", total=10_000_000_000, done=1_000_000_000) as progress:
        for _ in range(7):
            now += 2
            progress.add(100_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "fetched: 1.3 GB of 10.0 GB, 50.0 MB/s, 3 min left",
        "fetched: 1.6 GB of 10.0 GB, 50.0 MB/s, 3 min left",
    ]
