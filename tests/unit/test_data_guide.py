"""docs/data.md: its files, commands and outputs, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from ms4 import cli
from ms4.config_data import DataSection, FieldName, ThinkingCase
from ms4.data.format_names import FORMATS
from tests.commands import CHECKOUT

pytestmark = pytest.mark.slow

GUIDE = (CHECKOUT / "docs/data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the guide prints."""
    root = tmp_path_factory.mktemp("guide")
    named = re.findall(
        r"`([\w.]+)`[^\n]*:\n\n```jsonl\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE
    )
    assert len(named) == len(blocks("jsonl")), "a file of the guide has no name"
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name, text in named:
            Path(name).write_text(text, encoding="utf-8")
        for line in "".join(blocks("sh")).splitlines():
            program, *arguments = shlex.split(line)
            assert program == "ms4"
            capture = pytest.MonkeyPatch()
            out: list[str] = []
            capture.setattr(
                "builtins.print", lambda *t, out=out, **_: out.append(" ".join(map(str, t)))
            )
            try:
                assert cli.main(arguments) == 0, line
            finally:
                capture.undo()
            printed[line] = "\n".join(out)
    return printed


def test_the_outputs_are_those_of_the_commands(ran: dict[str, str]) -> None:
    whole = "\n".join(ran.values())
    assert len(blocks("text")) == 4
    for text in blocks("text"):
        assert text.rstrip("\n") in whole


def test_what_the_guide_says_of_each_command(ran: dict[str, str]) -> None:
    commands = list(ran)
    mended = json.loads(next(ran[line] for line in commands if "{empty: fix}" in line))
    assert (mended["records"], mended["samples"], mended["dropped"]) == (3, 3, 0)
    plain = next(ran[line] for line in commands if "--effort none" in line)
    assert "effort none: 3 samples, 100.0% of the tokens" in plain
    kinds = next(ran[line] for line in commands if "alpaca.json" in line)
    for name in (
        "mixed.jsonl: ShareGPT, 2",
        "alpaca.json: Alpaca, 2",
        "pairs.csv: prompt–completion",
        "questions.jsonl: question–answer",
        "story.txt: plain text",
    ):
        assert name in kinds
    assert "8 records: 8 samples, 0 dropped" in kinds
    mapped = next(ran[line] for line in commands if "dialogs.jsonl" in line)
    assert "effort high: 1 sample" in mapped
    assert "nothing is made of" not in mapped


def test_the_guide_names_what_there_is() -> None:
    for name in FORMATS:
        assert f"| `{name}` |" in GUIDE
    for case in get_args(ThinkingCase):
        assert f"| `{case}` |" in GUIDE
    (names,) = re.findall(r"Fields that can be mapped: (.*?)\. A name", GUIDE)
    assert re.findall(r"`(\w+)`", names) == list(get_args(FieldName))
    fields = set(re.findall(r"`data\.(\w+)", GUIDE))
    assert fields <= set(DataSection.model_fields)
    unnamed = {"train", "test", "modality", "images", "packing", "fields", "roles"}
    assert set(DataSection.model_fields) - fields <= unnamed
