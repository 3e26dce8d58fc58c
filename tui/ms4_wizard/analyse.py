"""Looks at training data in a process of its own: `python -m ms4_wizard.analyse`.

A configuration as JSON on standard input; on standard output a JSON object a line: `{"size": …}`,
`{"sample": …}` for each of the first samples, `{"bytes": so far}`, and at the end `{"found": …}`,
which is what `ms4 data --json` prints, or `{"error": …}`. The wizard's keys are answered meanwhile,
and to cancel is to end the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

SAMPLES = 50
"""Samples that are shown as the model sees them."""
CHARACTERS = 20_000
"""Of a sample that are shown."""
PROGRESS_EVERY_S = 0.2


def _say(out: TextIO, **what: Any) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


def main() -> int:
    """Read, look, and tell; returns the exit code."""
    out = sys.stdout
    os.nice(19)  # the screen comes first
    from ms4.config import RunConfig, check
    from ms4.data import preview, sources
    from ms4.errors import Ms4Error

    try:
        config: RunConfig = check(json.load(sys.stdin), "the answers")
        found = sources.expand(config.data.train)
        local = [source.path for source in found if source.hub is None]
        _say(out, size=sum(path.stat().st_size for path in local if path.is_file()))
        chat = preview.tokenizer(None, config)
        _samples(out, config, chat, found)
        done, said = 0, 0.0

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            if time.monotonic() - said >= PROGRESS_EVERY_S:
                said = time.monotonic()
                _say(out, bytes=done)

        survey = preview.survey(config, chat, found, advance)
        tree = preview.tree(config, survey)
        tree["histogram"] = _histogram(survey)
        tree["faults"] = [str(fault)[:500] for fault in survey.faults.first()]
        tree["fault_count"] = len(survey.faults)
        _say(out, found=tree)
    except Ms4Error as error:
        _say(out, error=str(error))
    except OSError as error:
        _say(out, error=f"cannot be read ({error.strerror or error})")
    return 0


def _histogram(survey: Any) -> list[tuple[str, int]]:
    from ms4.data.histogram import by_length

    return by_length(survey.tally.sample_lengths)


def _samples(out: TextIO, config: Any, chat: Any, found: Any) -> None:
    """The first samples, in pieces that are trained or not, control tokens or text."""
    from ms4.data.prepare import Recipe, read_files, started
    from ms4.data.render import pieces

    told = 0
    with started(chat, Recipe(config.data, with_images=True), 1, 0) as pool:
        for result in read_files(found, pool, config.data):
            for batch in result.batches:
                for outcome in batch.outcomes:
                    if outcome.sample is None:
                        continue
                    encoded = outcome.sample.encoded
                    shown, room = [], CHARACTERS
                    for text, trained, special in pieces(chat, encoded):
                        shown.append((text[:room], trained, special))
                        room -= len(text)
                        if room <= 0:
                            break
                    _say(
                        out,
                        sample={
                            "place": f"{result.source.name}:{outcome.line}",
                            "effort": outcome.sample.effort,
                            "tokens": len(encoded.tokens),
                            "trained": int(encoded.trained.sum()),
                            "pieces": shown,
                            "cut": room <= 0,
                        },
                    )
                    told += 1
                    if told >= SAMPLES:
                        return


if __name__ == "__main__":
    sys.exit(main())
