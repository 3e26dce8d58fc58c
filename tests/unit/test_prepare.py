"""The stage's options: processes, weights, held-out shares, masks, lengths, what is left out."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms4 import config
from ms4.data import dataset, prepare
from ms4.data.chat import Chat, Masking
from ms4.data.conversation import parse_record
from ms4.data.dataset import read_test, run_stage
from ms4.errors import Ms4Error
from tests.unit.projects import Record, configure, documents, fetch, packed, result, sample, write


@pytest.fixture(autouse=True)
def project(tmp_path: Path, small_tekken: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project whose weights are fetched; the current directory."""
    monkeypatch.chdir(tmp_path)
    fetch(small_tekken.parent)
    return tmp_path


def chats(count: int, seed: int = 0) -> list[Record]:
    """Conversations of several turns and of many lengths."""
    noise = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(noise.choices(["one", "two", "three", "four", "die", "Katze"], k=most))

    records = []
    for number in range(count):
        messages: list[Record] = []
        for _ in range(noise.randint(1, 4)):
            thinking = words(5) if number % 3 == 0 else None
            messages += sample(words(8), words(noise.randint(1, 60)), thinking)["messages"]
        records.append({"messages": messages})
    return records


# Processes.


def written() -> str:
    """A hash of all that the stage writes."""
    paths = ["data/packed/train.safetensors", "data/packed/test.jsonl", "results/data.json"]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    write("train.jsonl", *chats(700), "nonsense\n", *chats(700, seed=1))
    write("test.jsonl", *chats(20, seed=2))
    monkeypatch.setattr(prepare, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(prepare, "_BATCH_ROWS", 50)
    found = set()
    for threads in (1, 2, 3):
        run_stage(
            configure(threads, test={"t": "test.jsonl"}, faulty="drop", holdout=0.02,
                      sequence_length=512, weights={"train.jsonl": 1.5})
        )  # fmt: skip
        found.add(written())
    assert len(found) == 1
    train = result()["train"]
    assert train["records"] == 1401
    assert train["samples"] + train["dropped"] + train["held_out"] == 1401


def test_a_killed_process_is_an_error(monkeypatch: pytest.MonkeyPatch, chat: Chat) -> None:
    write("train.jsonl", *chats(300))
    monkeypatch.setattr(prepare, "PARALLEL_BYTES", 1)
    monkeypatch.setattr(prepare, "_BATCH_ROWS", 10)
    encode = Chat.encode
    parent = os.getpid()

    def dies(self: Chat, *arguments: Any, **named: Any) -> Any:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, *arguments, **named)

    monkeypatch.setattr(Chat, "encode", dies)
    with pytest.raises(Ms4Error, match="a process that turns conversations into tokens was killed"):
        run_stage(configure(2))
    assert list(Path("data/packed").iterdir()) == []


STAGE = """
import sys
from pathlib import Path
from ms4 import config
from ms4.data import dataset, prepare
prepare.PARALLEL_BYTES = 1
prepare._BATCH_ROWS = 20
values = {"data": {"train": ["train.jsonl"]}, "run": {"threads": 2}}
Path("started").touch()
dataset.run_stage(config.RunConfig.model_validate(values))
"""


def kill_and_finish(kills: int, seed: int) -> None:
    """Kill the stage at random moments, run it to its end, and compare with an undisturbed run."""
    write("train.jsonl", *chats(1500))
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", STAGE], check=True, capture_output=True)
    took = time.monotonic() - started
    undisturbed = written()
    noise = random.Random(seed)
    for _ in range(kills):
        Path("results/data.json").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", STAGE], stdout=subprocess.DEVNULL)
        time.sleep(noise.random() * took)
        process.kill()
        process.wait()
    subprocess.run([sys.executable, "-c", STAGE], check=True, capture_output=True)
    assert written() == undisturbed
    assert sorted(path.name for path in Path("data/packed").iterdir()) == [
        "test.jsonl",
        "train.safetensors",
    ]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again() -> None:
    kill_and_finish(3, seed=0)


@pytest.mark.soak
def test_killed_at_any_moment_soak() -> None:
    kill_and_finish(60, seed=1)


# What is taken how often, and what is held out.


def test_weights_of_files(chat: Chat) -> None:
    many = [sample(f"{n}?", "yes") for n in range(400)]
    write("a.jsonl", *many)
    write("b.jsonl", sample("b", "once"))
    write("c1.jsonl", sample("c", "twice"))
    run_stage(
        configure(
            train=["a.jsonl", "b.jsonl", "c*.jsonl"], weights={"a.jsonl": 0.25, "c*.jsonl": 2.5}
        )
    )
    data = packed()
    taken = np.bincount(data.bin_documents, minlength=data.documents).tolist()
    kept = data.documents - 2
    assert 70 <= kept <= 130, "a quarter of them"
    assert taken[:kept] == [1] * kept
    assert taken[kept] == 1
    assert taken[kept + 1] in (2, 3)
    assert result()["train"]["samples"] == 402
    # Content decides: the same ones whatever else is there, and in whatever order.
    first = documents()[:kept]
    write("a.jsonl", *reversed(many))
    run_stage(configure(train=["a.jsonl"], weights={"a.jsonl": 0.25}))
    assert sorted(documents()) == sorted(first)


def test_nothing_of_a_small_weight_is_left() -> None:
    write("train.jsonl", sample("a", "b"))
    with pytest.raises(
        Ms4Error, match=r"nothing is left to train on: data.weights leaves out every"
    ):
        run_stage(configure(weights={"train.jsonl": 1e-9}))


def test_a_share_is_held_out_by_content(chat: Chat) -> None:
    records = [sample(f"{n}?", f"{n}!", f"{n}" if n % 2 else None) for n in range(500)]
    write("train.jsonl", *records)
    run_stage(configure(holdout=0.1))
    train, test = result()["train"], result()["test"]
    assert 30 <= train["held_out"] <= 75
    assert test["holdout"]["samples"] == train["held_out"]
    assert train["records"] == 500 == train["samples"] + train["held_out"]
    rows = list(read_test(Path("data/packed/test.jsonl")))
    assert {row.set for row in rows} == {"holdout"}
    lines = {row.line for row in rows}
    seen = {tuple(document) for document in documents()}
    for number, record in enumerate(records, 1):
        effort: config.Effort = "high" if record["messages"][1]["reasoning"] else "none"
        tokens = tuple(chat.encode(parse_record(record), effort).tokens.tolist())
        assert (tokens in seen) != (number in lines)
    # It stays on its side among other data, and a larger share holds it too.
    write("train.jsonl", *records[250:], *chats(20), *records[:250])
    run_stage(configure(holdout=0.2))
    again = {row.answer for row in read_test(Path("data/packed/test.jsonl"))}
    assert {row.answer for row in rows} <= again


def test_a_share_that_is_held_out_and_a_weight_do_not_go_together() -> None:
    write("train.jsonl", *[sample(f"{n}?", f"{n}!") for n in range(500)])
    run_stage(configure(holdout=0.5, weights={"train.jsonl": 0.5}))
    # Half of what is not held out, and not what the held-out share leaves of the same half.
    assert 90 <= packed().documents <= 160


def test_near_duplicates_of_held_out_samples_are_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    question = "Please explain in your own words how a bicycle stays upright while it is moving."
    answer = (
        "It steers into the fall, and so the wheels come back under the weight of the rider. " * 3
    )
    write("train.jsonl", sample(question, answer + "Yes"), sample("a", "b"))
    write("test.jsonl", sample(question, answer))
    run_stage(configure(test={"t": "test.jsonl"}))
    near = result()["train"]["near_duplicates"]
    assert near["count"] == 1
    assert near["first"][0]["sample"] == "train.jsonl:1"
    assert near["first"][0]["held_out"] == "t, test.jsonl:1"
    assert near["first"][0]["similarity"] > 0.8
    assert "nearly the same as held-out samples: 1 sample, train.jsonl:1" in capsys.readouterr().out


def test_near_duplicates_of_what_is_held_out_by_content_are_reported() -> None:
    answer = "It steers into the fall, and so the wheels come back under the rider's weight. " * 3
    write("train.jsonl", *[sample("Why?", f"{answer}{n}") for n in range(20)], sample("a", "b"))
    run_stage(configure(holdout=0.3))
    train = result()["train"]
    assert 0 < train["held_out"] < 20
    # Held-out samples may stand before or after those that they are like.
    near = train["near_duplicates"]
    assert near["count"] == 20 - train["held_out"]
    assert near["first"][0]["held_out"].startswith("holdout, train.jsonl:")


# What is trained.


def three_turns() -> Record:
    messages = []
    for n in range(3):
        messages += sample(f"{n}?", f"answer {n}", f"thought {n}")["messages"]
    call = {"id": "a", "function": {"name": "f", "arguments": {}}}
    messages[3]["tool_calls"] = [call]
    messages.insert(4, {"role": "tool", "tool_call_id": "a", "content": "21"})
    return {"messages": messages}


@pytest.mark.parametrize(
    ("settings", "masking"),
    [
        ({}, Masking()),
        ({"untrained": ["earlier_turns"]}, Masking(turns="last")),
        ({"untrained": ["thinking"]}, Masking(thinking=False)),
        ({"untrained": ["tool_calls"]}, Masking(tool_calls=False)),
        ({"earlier_thinking": "mask"}, Masking(earlier_thinking=False)),
        ({"untrained": ["thinking", "earlier_turns"]}, Masking(turns="last", thinking=False)),
    ],
)
def test_the_settings_decide_what_is_trained(
    settings: dict[str, Any], masking: Masking, chat: Chat
) -> None:
    write("train.jsonl", three_turns())
    run_stage(configure(**settings))
    expected = chat.encode(parse_record(three_turns()), "high", masking)
    tokens, trained = packed().document(0)
    assert tokens.tolist() == expected.tokens.tolist()
    assert trained.tolist() == expected.trained.tolist()


def test_weights_of_messages_are_honoured(chat: Chat) -> None:
    record = three_turns()
    record["messages"][1]["weight"] = 0
    record["messages"][-1]["train"] = False
    write("train.jsonl", record)
    run_stage(configure())
    tokens, trained = packed().document(0)
    told = "[THINK]thought 1[/THINK]answer 1[TOOL_CALLS]f[ARGS]{}</s>"
    assert chat.decode(tokens[trained == 1]) == told


def test_nothing_trained_is_a_fault() -> None:
    record = sample("a", "b")
    record["messages"][1]["weight"] = 0
    write("train.jsonl", record, sample("c", "d"))
    with pytest.raises(
        Ms4Error, match=r"train.jsonl:1: nothing of it would be trained: .*; remove it"
    ):
        run_stage(configure())


def test_held_out_samples_are_evaluated_whatever_is_trained() -> None:
    record = sample("a", "b", "c")
    record["messages"][1]["weight"] = 0
    write("train.jsonl", sample("x", "y"))
    write("test.jsonl", record)
    run_stage(configure(test={"t": "test.jsonl"}, untrained=["thinking"]))
    for row in read_test(Path("data/packed/test.jsonl")):
        assert row.answer == "b"
        assert row.trained is not None
        assert sum(row.trained) > 1


def test_earlier_thinking_is_dropped(chat: Chat) -> None:
    write("train.jsonl", three_turns())
    run_stage(configure(earlier_thinking="drop"))
    text = chat.decode(packed().document(0)[0])
    assert text.count("[THINK]") == 1
    assert text.endswith("[THINK]thought 2[/THINK]answer 2</s>")


def test_joined_messages_and_other_tags_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    user, said = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    write(
        "train.jsonl",
        {"messages": [user, user, user, said, said]},
        {"messages": [{"role": "system", "content": "a"}] * 2 + [user, said]},
        sample("a", "<thinking>b</thinking>c"),
        sample("a", "<THINK>b</THINK>c"),
        sample("a <thinking>", "a tag is `<thinking>`, <think> is another"[:20]),
        sample("a", "<think>b</think>c"),
    )
    run_stage(configure())
    assert result()["train"]["changed"] == {"joined": 3}
    assert result()["train"]["thinking"] == {"other_tags text": 2}
    out = capsys.readouterr().out
    assert "rules: messages are joined to the one before, of the same role (3 times)" in out
    assert "thinking by other tags (2 samples): only `<think>` and `[THINK]` mean" in out


def test_a_conversation_written_out_as_plain_text_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = ("<|im_start|>user\na<|im_end|>", "### Instruction:\na", "About [INS] and users.")
    write("train.jsonl", *({"text": text} for text in texts))
    run_stage(configure())
    assert result()["train"]["thinking"] == {"template text": 2}
    told = "plain text with the marks of a chat template (2 samples): all of it is trained"
    assert told in capsys.readouterr().out


# Faults.


def test_faulty_records_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", sample("a", "b"), "nonsense\n", {"messages": []}, sample("c", "d", "e"))
    run_stage(configure(faulty="drop", reasoning="none", thinking={"under_none": "drop"}))
    train = result()["train"]
    assert (train["records"], train["samples"], train["dropped"]) == (4, 1, 3)
    lines = Path("data/faults.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"train.jsonl:{n}" for n in (2, 3, 4)]
    assert "data.thinking.under_none is `drop`: holds thinking" in lines[2]
    assert "dropped for other reasons: 3 records (in data/faults.txt)" in capsys.readouterr().out


def test_what_a_policy_drops_stops_nothing() -> None:
    write("train.jsonl", sample("a", "b"), sample("c", "d", reasoning_effort="high"))
    run_stage(configure(thinking={"missing": "drop"}))
    train = result()["train"]
    assert (train["records"], train["samples"], train["dropped"]) == (2, 1, 1)
    text = Path("data/faults.txt").read_text()
    assert text.startswith("train.jsonl:2: data.thinking.missing is `drop`: the last turn does not")


def test_faults_of_whole_files_and_of_held_out_sets_always_stop() -> None:
    write("train.jsonl", sample("a", "b"))
    with pytest.raises(Ms4Error, match=r"gone.jsonl: no such file"):
        run_stage(configure(train=["train.jsonl", "gone.jsonl"], faulty="drop"))
    write("test.jsonl", "nonsense\n")
    with pytest.raises(Ms4Error, match=r"test.jsonl:1: not valid JSON"):
        run_stage(configure(test={"t": "test.jsonl"}, faulty="drop"))
    write("test.jsonl", {"text": "a"})
    with pytest.raises(Ms4Error, match=r"test.jsonl:1: plain text has no answer to compare with"):
        run_stage(configure(test={"t": "test.jsonl"}))


def test_all_records_faulty() -> None:
    write("train.jsonl", "nonsense\n")
    with pytest.raises(Ms4Error, match=r"nothing is left to train on: 1 record dropped \(in data"):
        run_stage(configure(faulty="drop"))


def test_a_field_that_no_record_has() -> None:
    write("train.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(
        Ms4Error, match=r"train.jsonl: no record has `cot` .thinking., which data.fi"
    ):
        run_stage(configure(fields={"thinking": "cot"}))


def test_images_are_refused_where_only_text_trains() -> None:
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": content}, *sample("a", "b")["messages"][1:]]}
    write("train.jsonl", record)
    write("test.jsonl", record)
    with pytest.raises(Ms4Error) as caught:
        run_stage(configure(test={"t": "test.jsonl"}))
    assert "train.jsonl:1: holds images, and data.modality is `text`; set" in str(caught.value)
    assert "test.jsonl:1: holds images, and data.modality is `text`; set" in str(caught.value)


def test_policies_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", sample("a", "b", reasoning_effort="high"), sample("c", "d"))
    run_stage(configure(thinking={"missing": "warn"}))
    train = result()["train"]
    assert train["thinking"] == {"missing warn": 1}
    assert train["by_kind"]["high, without thinking"]["samples"] == 1
    printed = capsys.readouterr().out
    assert "thinking, data.thinking.missing: 1 case taken as they are" in printed
    assert "high, without thinking: 1 sample, " in printed


def test_the_arrays_are_mapped_and_aligned() -> None:
    write("train.jsonl", *chats(50))
    run_stage(configure())
    data = packed()
    for array in (data.tokens, data.trained, data.document_starts, data.bin_documents):
        base: Any = array
        while isinstance(base, np.ndarray) and base.base is not None:
            if isinstance(base, np.memmap):
                break
            base = base.base
        assert isinstance(base, np.memmap)
        assert not array.flags.writeable
        assert array.flags.aligned
    # Any reader of safetensors reads it too.
    from safetensors.numpy import load_file

    loaded = load_file(dataset.TRAIN)
    assert (loaded["tokens"] == data.tokens).all()
    assert (loaded["bin_starts"] == data.bin_starts).all()


def test_a_sample_that_stands_twice_is_held_out_twice(project: Path) -> None:
    """Both by their content: the second does not stand in the way of the first."""
    records = [sample(f"What is {n} + 1?", f"{n + 1}") for n in range(40)]
    write("train.jsonl", *records, *records)
    run_stage(configure(holdout=0.3))
    found = json.loads(Path("results/data.json").read_text())
    assert found["train"]["held_out"] > 0
    assert found["train"]["held_out"] % 2 == 0
    assert found["train"]["samples"] + found["train"]["held_out"] == 80
