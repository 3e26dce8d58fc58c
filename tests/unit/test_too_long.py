"""Samples over the sequence length: truncated after a turn, cut into pieces, or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.data.dataset import run_stage
from tests.unit.projects import Record, configure, documents, fetch, packed, result, sample, write


@pytest.fixture(autouse=True)
def project(tmp_path: Path, small_tekken: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project whose weights are fetched; the current directory."""
    monkeypatch.chdir(tmp_path)
    fetch(small_tekken.parent)
    return tmp_path


def three_turns() -> Record:
    messages = []
    for n in range(3):
        messages += sample(f"{n}?", f"answer {n}", f"thought {n}")["messages"]
    return {"messages": messages}


def test_a_sample_is_truncated_after_a_turn(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    record = three_turns()
    whole = chat.encode(parse_record(record), "high")
    for length, turns in ((len(whole.tokens), 3), (len(whole.tokens) - 1, 2)):
        write("train.jsonl", record)
        run_stage(configure(sequence_length=length, too_long="truncate"))
        shorter = {"messages": record["messages"][: 2 * turns]}
        expected = chat.encode(parse_record(shorter), "high")
        tokens, trained = packed().document(0)
        assert tokens.tolist() == expected.tokens.tolist()
        assert trained.tolist() == expected.trained.tolist()
        assert result()["train"]["truncated"] == (turns < 3)
    assert "truncated after a turn: 1 sample" in capsys.readouterr().out


def test_truncation_ends_with_a_turn_of_its_effort(chat: Chat) -> None:
    record = three_turns()
    record["messages"][3]["reasoning"] = None
    length = len(chat.encode(parse_record(record), "high").tokens) - 1
    write("train.jsonl", record)
    run_stage(configure(sequence_length=length, too_long="truncate"))
    assert chat.decode(packed().document(0)[0]).endswith("[THINK]thought 0[/THINK]answer 0</s>")


def test_truncation_leaves_something_trained(chat: Chat) -> None:
    """The first turn that fits is untrained where it would be the last: the one before is taken."""
    record = three_turns()
    record["messages"][3]["weight"] = 0
    length = len(chat.encode(parse_record(record), "high").tokens) - 1
    write("train.jsonl", record)
    for settings in ({"untrained": ["earlier_turns"]}, {}):
        run_stage(configure(sequence_length=length, too_long="truncate", **settings))
        tokens, trained = packed().document(0)
        assert chat.decode(tokens[trained == 1]).endswith("[THINK]thought 0[/THINK]answer 0</s>")
        assert (chat.decode(tokens).count("</s>") == 1) == bool(settings)
        assert result()["train"]["truncated"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 0}, "2 with nothing trained up to there"),
        ({"reasoning": None}, "2 without the thinking of its effort"),
        (
            {"tool_calls": [{"id": "abc", "function": {"name": "f", "arguments": "{}"}}]},
            "2 with a tool call, whose result is cut off",
        ),
    ],
)
def test_no_end_that_a_truncated_sample_may_have(
    change: dict[str, Any], reason: str, chat: Chat
) -> None:
    """It is left out and counted, with the reason; not a fault."""
    record = three_turns()
    for index in (3, 1):
        record["messages"][index] |= change
        if "tool_calls" in change:
            answer = {"role": "tool", "content": "1", "tool_call_id": "abc"}
            record["messages"].insert(index + 1, answer)
    length = len(chat.encode(parse_record(record), "high").tokens)
    write("train.jsonl", record, sample("a", "b"))
    run_stage(configure(sequence_length=length - 1, too_long="truncate"))
    train = result()["train"]
    assert (train["samples"], train["dropped"], train["too_long"]) == (1, 1, 1)
    assert Path("data/faults.txt").read_text().splitlines() == [
        f"train.jsonl:1: {length} tokens, and none of its turns within data.sequence_length "
        f"{length - 1} can be its end ({reason}); raise it or shorten the sample"
    ]


def test_what_cannot_be_truncated_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", sample("a", "b " * 50), sample("a", "b"))
    run_stage(configure(sequence_length=32, too_long="truncate"))
    train = result()["train"]
    assert (train["samples"], train["dropped"], train["truncated"]) == (1, 1, 0)
    assert "no turn of the assistant ends within data.sequence_length 32" in (
        Path("data/faults.txt").read_text()
    )


def test_plain_text_is_cut_into_pieces(chat: Chat) -> None:
    text = "Once upon a time there was a cat. " * 20
    write("train.jsonl", {"text": text}, {"text": "short"})
    run_stage(configure(sequence_length=64))
    whole = documents()
    assert [token for document in whole[:-1] for token in document] == (
        chat.encode(parse_plain(text), "none").tokens.tolist()
    )
    assert max(map(len, whole)) == 64
    train = result()["train"]
    assert (train["samples"], train["documents"]) == (2, len(whole))
    assert train["by_kind"]["plain text"]["samples"] == 2
    # What a piece begins with follows from nothing that the model sees.
    made = packed()
    masks = [made.document(number)[1].tolist() for number in range(made.documents)]
    assert masks == [[0] + [1] * (len(tokens) - 1) for tokens in whole]
    assert train["trained_tokens"] == sum(map(sum, masks))


def parse_plain(text: str) -> Any:
    from ms4.data.conversation import Conversation

    return Conversation(messages=(), plain=text)
