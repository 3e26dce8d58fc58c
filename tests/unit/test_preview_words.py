"""`ms4 data`: its words for faults, settings and wrong arguments, and how it shows images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ms4.data.faults import LISTED
from tests.chat_reference import png
from tests.unit.projects import sample, write


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_faults_of_each_kind_are_shown(data: Any) -> None:
    """However many of one kind stand before them, in the order of their lines."""
    write("a.jsonl", sample("a", "b"), *["{}\n"] * 30, "broken\n", {"messages": []})
    shown = [line for line in data("a.jsonl")[1].splitlines() if line.startswith("  a.jsonl:")]
    assert [line.split(":")[1] for line in shown] == [*map(str, range(2, LISTED)), "32", "33"]


def test_what_settings_leave_out_is_no_fault(data: Any) -> None:
    write("a.jsonl", sample("a", "b"), sample("a", "b " * 50), sample("a", "<think></think>b"))
    settings = ("--set", "data.sequence_length=40", "--set", "data.too_long=drop")
    code, out, _ = data(*settings, "a.jsonl")
    assert code == 0
    assert "1 fault and 1 record that settings leave out (all in" in out
    assert "40; raise it or shorten the sample (data.too_long is `drop`)" in out
    assert "fill it or remove the part, or set data.thinking.empty" in out
    out = data(*settings, "--set", "data.thinking={empty: drop}", "a.jsonl")[1]
    assert "\n2 records that settings leave out (all in" in out


def test_a_list_of_faults_that_are_gone_is_removed(data: Any) -> None:
    write("a.jsonl", "{}\n")
    data("a.jsonl")
    assert Path("ms4-data-faults.txt").exists()
    write("a.jsonl", sample("a", "b"))
    data("a.jsonl")
    assert not Path("ms4-data-faults.txt").exists()


def test_a_file_without_records_has_no_format(data: Any) -> None:
    code, out, _ = data("no.jsonl")
    assert (code, out.splitlines()[0]) == (2, "no.jsonl: unknown, 0 records")
    assert out.splitlines()[-1] == "nothing can be used: correct the faults"
    write("a.jsonl", sample("a", "b"))
    found = json.loads(data("--json", "no.jsonl", "a.jsonl")[1])
    assert (found["format"], found["files"]["no.jsonl"]["format"]) == ("messages", "unknown")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "a file without a name; name data files"),
        (["--tokenizer", "no.json", "a.jsonl"], "no.json: no such file; name a tekken.json"),
        (["--set", "data.untrained=[thinkin]", "a.jsonl"], "Input should be 'earlier_turns', 'th"),
        (["--set", "data.weights={b.jsonl: 2}", "a.jsonl"], "data.weights: b.jsonl is no entry of"),
        (["--show", "1", "b.jsonl"], "0 samples that can be used; without --show, the reasons"),
    ],
)
def test_wrong_arguments_are_told(data: Any, arguments: list[str], message: str) -> None:
    write("a.jsonl", sample("a", "b"))
    code, _, told = data(*arguments)
    assert code == 2
    assert message in told


def test_an_image_is_shown_by_the_number_of_its_tokens(data: Any) -> None:
    Path("a.png").write_bytes(png(84, 56))
    image = {"type": "image", "path": "a.png"}
    content = [{"type": "text", "text": "[IMG][IMG_END]"}, image, image]
    answer = {"role": "assistant", "content": "!"}
    write("a.jsonl", {"messages": [{"role": "user", "content": content}, answer]})
    out = data("--set", "data.modality=text_vision", "--show", "1", "a.jsonl")[1]
    assert "[INST][IMG][IMG_END][IMG × 8][IMG × 8][/INST]⟦!</s>⟧" in out
