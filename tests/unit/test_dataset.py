"""The stage `preprocess`: what it writes is what mistral-common encodes, or it says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.numpy import save_file

from ms4 import cli, config, manifest
from ms4.data import dataset
from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.data.dataset import load_packed, read_test, run_stage
from ms4.data.tekken import write_tekken
from ms4.errors import Ms4Error
from tests.unit.projects import Record, configure, fetch, sample, write


@pytest.fixture(scope="module")
def weights(small_tekken: Path) -> Path:
    return small_tekken.parent


@pytest.fixture
def project(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project whose weights are fetched; the current directory."""
    monkeypatch.chdir(tmp_path)
    fetch(weights)
    return tmp_path


def sums(count: int, start: int = 0) -> list[Record]:
    """Samples of either effort, of many lengths."""
    return [
        sample(f"{n} and {n}?", str(2 * n), f"{n} + {n}. " * (n % 5) if n % 2 else None)
        for n in range(start + 1, start + count + 1)
        if n % 10 != 5
    ]


def test_what_is_written(project: Path, chat: Chat) -> None:
    records = sums(50)
    write("train.jsonl", *records[:20])
    write("more.jsonl", *records[20:])
    Path("data/packed").mkdir(parents=True)
    write("data/packed/.train.safetensors.1.tmp", "left by a kill")
    run_stage(configure(train=["train.jsonl", "more.jsonl"], sequence_length=128))
    packed = load_packed(Path("data/packed/train.safetensors"))
    assert packed.documents == len(records)
    by_effort = {
        effort: {"samples": 0, "tokens": 0, "trained_tokens": 0} for effort in ("none", "high")
    }
    for number, record in enumerate(records):
        effort: config.Effort = "high" if record["messages"][1]["reasoning"] else "none"
        expected = chat.encode(parse_record(record), effort)
        tokens, trained = packed.document(number)
        assert tokens.tolist() == expected.tokens.tolist()
        assert trained.tolist() == expected.trained.tolist()
        by_effort[effort]["samples"] += 1
        by_effort[effort]["tokens"] += len(tokens)
        by_effort[effort]["trained_tokens"] += int(trained.sum())
    bins = [packed.bin(number).tolist() for number in range(packed.bins)]
    assert sorted(number for documents in bins for number in documents) == list(range(45))
    filled = [sum(len(packed.document(d)[0]) for d in documents) for documents in bins]
    assert max(filled) <= 128
    result = json.loads(Path("results/data.json").read_text())
    assert result["stage"] == "preprocess"
    assert list(result["inputs"]) == ["weights/source.json", "train.jsonl", "more.jsonl"]
    assert [entry["path"] for entry in result["files"]] == [
        "data/packed/train.safetensors",
        "data/packed/test.jsonl",
    ]
    manifest.check_files(result, Path(), hashes=True)
    assert result["train"] == {
        "records": 45,
        "samples": 45,
        "dropped": 0,
        "too_long": 0,
        "truncated": 0,
        "turns": 45,
        "tokens": len(packed.tokens),
        "trained_tokens": int(packed.trained.sum()),
        "by_effort": by_effort,
        "by_kind": by_effort,
        "thinking": {},
        "changed": {},
        "documents": 45,
        "bins": len(bins),
        "fill": round(sum(filled) / (128 * len(bins)), 6),
        "longest": max(len(packed.document(d)[0]) for d in range(45)),
        "held_out": 0,
        "formats": {"train.jsonl": "OpenAI messages", "more.jsonl": "OpenAI messages"},
        "unused": {},
        "near_duplicates": {"count": 0, "first": []},
    }
    assert result["train"]["tokens"] == sum(filled) == sum(e["tokens"] for e in by_effort.values())
    assert result["test"] == {}
    assert sorted(path.name for path in Path("data/packed").iterdir()) == [
        "test.jsonl",
        "train.safetensors",
    ]


def test_the_same_input_gives_the_same_bytes(project: Path) -> None:
    write("train.jsonl", *sums(40))
    write("test.jsonl", *sums(10, start=100))
    written = []
    for _ in range(2):
        run_stage(configure(test={"sums": "test.jsonl"}))
        result = Path("results/data.json")
        paths = [result, *(Path(e["path"]) for e in json.loads(result.read_text())["files"])]
        written.append([path.read_bytes() for path in paths])
        for path in paths:
            path.unlink()
    assert written[0] == written[1]
    assert str(project) not in written[0][0].decode()


def test_held_out_samples_in_both_efforts(project: Path, chat: Chat) -> None:
    write("train.jsonl", sample("a", "b"))
    multi = sample("1?", "one ", "uno")
    multi["messages"] += sample("2?", "two")["messages"]
    plain, thinking = sample("hi", " hello "), sample("2+2?", "4", "two and two")
    call = {"id": "c1", "function": {"name": "f", "arguments": '{"a":1}'}}
    calls = {"messages": [plain["messages"][0], {"role": "assistant", "tool_calls": [call]}]}
    # The field does not matter here: each sample is evaluated in both efforts.
    plain["reasoning_effort"], thinking["reasoning_effort"] = "high", "none"
    write("test.jsonl", plain, thinking, "\n", multi, calls)
    write("other.jsonl", sample("x", "y", "z"))
    # Efforts of the evaluation do not change what is written.
    run_stage(configure(test={"mixed": "test.jsonl", "other": "other.jsonl"}))
    rows = list(read_test(Path("data/packed/test.jsonl")))
    assert [(row.set, row.line, row.effort) for row in rows] == [
        (name, line, effort)
        for name, line in [*(("mixed", n) for n in (1, 2, 4, 5)), ("other", 1)]
        for effort in ("none", "high")
    ]
    answers = ["hello", "4", "two", '[TOOL_CALLS]f[ARGS]{"a": 1}', "y"]
    assert [row.answer for row in rows[::2]] == [row.answer for row in rows[1::2]] == answers
    for row in rows:
        record = {1: plain, 2: thinking, 4: multi, 5: calls}[row.line]
        if row.set == "other":
            record = sample("x", "y", "z")
        conversation = parse_record(record)
        if row.effort == "none":
            conversation = conversation.without_thinking()
        expected = chat.encode(conversation, row.effort)
        assert row.prompt == expected.prompt.tolist()
        if row.effort == "high" and not conversation.ends_with_thinking:
            assert (row.tokens, row.trained) == (None, None)
            continue
        assert row.tokens is not None
        assert row.tokens == expected.tokens.tolist()
        assert row.trained == expected.trained.tolist()
        turn = row.tokens[len(row.prompt) :]
        assert chat.decode_answer(turn, row.effort)[1:] == (row.answer, True)
        assert ("[THINK]" in chat.decode(row.tokens)) == (row.effort == "high")
    text = chat.decode(rows[5].prompt)
    assert text.endswith("[THINK]uno[/THINK]one </s>[INST]2?[/INST]"), "earlier thinking is kept"
    result = json.loads(Path("results/data.json").read_text())
    tokens = dict.fromkeys(("mixed", "other"), 0)
    for row in rows:
        tokens[row.set] += len(row.tokens or [])
    assert result["test"] == {
        "mixed": {"samples": 4, "tokens": tokens["mixed"]},
        "other": {"samples": 1, "tokens": tokens["other"]},
    }


def test_a_serving_stack_makes_the_same_prompts(project: Path, weights: Path) -> None:
    write("train.jsonl", sample("a", "b"))
    write("test.jsonl", *sums(10))
    run_stage(configure(test={"sums": "test.jsonl"}))
    serving = MistralTokenizer.from_file(weights / "tekken.json")
    rows = list(read_test(Path("data/packed/test.jsonl")))
    for row, record in zip(rows[::2], sums(10), strict=True):
        request: Any = ChatCompletionRequest.from_openai(
            messages=record["messages"][:1], reasoning_effort="none"
        )
        assert serving.encode_chat_completion(request).tokens == row.prompt


# Reasoning effort.

EFFORTS: list[tuple[str, Record, str]] = [
    ("none", sample("a", "b"), "none"),
    ("none", sample("a", "b", reasoning_effort="high"), "none"),
    ("none", sample("a", "b", "c"), "holds thinking, but data.reasoning is `none`.*`per_sample`"),
    ("high", sample("a", "b", "c"), "high"),
    ("high", sample("a", "b", "c", reasoning_effort="none"), "high"),
    ("high", sample("a", "b"), "the last turn does not think, but data.reasoning is `high`"),
    ("per_sample", sample("a", "b"), "none"),
    ("per_sample", sample("a", "b", "c"), "high"),
    ("per_sample", sample("a", "b", reasoning_effort="none"), "none"),
    ("per_sample", sample("a", "b", "c", reasoning_effort="high"), "high"),
    (
        "per_sample",
        sample("a", "b", "c", reasoning_effort="none"),
        "holds thinking, but it is of effort `none`; correct its `reasoning_effort`, or remove",
    ),
    (
        "per_sample",
        sample("a", "b", reasoning_effort="high"),
        "the last turn does not think, but it is of effort `high`; correct its",
    ),
    (
        "per_sample",
        {"messages": sample("a", "b", "c")["messages"] + sample("d", "e")["messages"]},
        "the last turn does not think",
    ),
]


@pytest.mark.parametrize(("reasoning", "record", "outcome"), EFFORTS)
def test_reasoning_effort(reasoning: str, record: Record, outcome: str, project: Path) -> None:
    write("train.jsonl", record)
    if outcome not in ("none", "high"):
        with pytest.raises(Ms4Error, match=f"train.jsonl:1: {outcome}"):
            run_stage(configure(reasoning=reasoning))
        return
    run_stage(configure(reasoning=reasoning))
    by_effort = json.loads(Path("results/data.json").read_text())["train"]["by_effort"]
    other = {"none": "high", "high": "none"}[outcome]
    assert (by_effort[outcome]["samples"], by_effort[other]["samples"]) == (1, 0)


# Faults.


def test_all_faults_come_together_and_nothing_is_written(project: Path) -> None:
    write("train.jsonl", sample("a", "b"), "nonsense\n", sample("c", "d", reasoning_effort="low"))
    thinks = {"role": "assistant", "content": None, "reasoning": "x"}
    write("test.jsonl", {"messages": [{"role": "user", "content": "x"}, thinks]}, sample("e", "f"))
    (project / "dir").mkdir()
    named = configure(train=["train.jsonl", "gone.jsonl", "dir"], test={"t": "test.jsonl"})
    with pytest.raises(Ms4Error) as caught:
        run_stage(named)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 5 faults:"
    places = ["train.jsonl:2:", "train.jsonl:3:", "gone.jsonl:", "dir:", "test.jsonl:1:"]
    assert [line.split()[0] for line in lines[1:]] == places
    assert "a turn of nothing but thinking has no answer; add one" in lines[5]
    assert Path("data/faults.txt").read_text().splitlines() == [line.strip() for line in lines[1:]]
    assert list(Path("data/packed").iterdir()) == []
    assert not Path("results").exists()


def test_refusals_of_mistral_common_have_their_line(project: Path) -> None:
    refused = sample("a", "b")
    refused["messages"] += [{"role": "system", "content": "x"}, *sample("c", "d")["messages"]]
    write("train.jsonl", sample("a", "b"), refused)
    refused["messages"].extend(sample("g", "h")["messages"])
    write("test.jsonl", refused, sample("e", "f"))
    with pytest.raises(Ms4Error) as caught:
        run_stage(configure(test={"t": "test.jsonl"}))
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  train.jsonl:2: refused by mistral-common: Unexpected role")
    assert any(line.startswith("  test.jsonl:1: refused by") for line in lines)


def test_a_training_sample_that_is_held_out(project: Path) -> None:
    write("train.jsonl", sample("a", "b"), sample("c", "d"), sample("c", "d "))
    write("test.jsonl", sample("x", "y"), sample("c", "d", id=3))
    with pytest.raises(Ms4Error) as caught:
        run_stage(configure(test={"t": "test.jsonl"}))
    assert str(caught.value).splitlines() == [
        "the data has a fault:",
        "  train.jsonl:2: stands word for word in a held-out set (t, test.jsonl:2), "
        "which would make the evaluation lie; remove it from one of them",
    ]


def test_too_long_is_an_error(project: Path) -> None:
    write("train.jsonl", sample("a", "b"), sample("a", "b " * 40), sample("a", "b " * 90 + "c"))
    with pytest.raises(Ms4Error) as caught:
        run_stage(configure(sequence_length=32))
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 2 faults:"
    assert lines[1].endswith(
        "tokens, but data.sequence_length is 32; raise it, shorten the sample, "
        "or set data.too_long to `drop` or `truncate`"
    )
    assert lines[1].startswith("  train.jsonl:2: ")
    assert lines[3].startswith("  2 samples are longer than data.sequence_length 32; the longest, ")
    assert "train.jsonl:3, has" in lines[3]


def test_too_long_is_dropped_and_counted(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", sample("a", "b " * 40), sample("a", "b"), sample("c", "d"))
    run_stage(configure(sequence_length=32, too_long="drop"))
    train = json.loads(Path("results/data.json").read_text())["train"]
    assert (train["records"], train["samples"], train["dropped"]) == (3, 2, 1)
    printed = capsys.readouterr().out
    assert "dropped: 1 sample is longer than data.sequence_length 32; the longest, t" in printed
    assert "what the model sees of train.jsonl:2" in printed


def test_a_sample_of_exactly_the_length_is_kept(project: Path, chat: Chat) -> None:
    record = sample("a", "b " * 40 + "c")
    length = len(chat.encode(parse_record(record), "none").tokens)
    write("train.jsonl", record)
    run_stage(configure(sequence_length=length))
    assert json.loads(Path("results/data.json").read_text())["train"]["fill"] == 1.0
    with pytest.raises(Ms4Error, match=f"{length} tokens, but"):
        run_stage(configure(sequence_length=length - 1))


def test_all_dropped(project: Path) -> None:
    write("train.jsonl", sample("a", "b " * 40))
    with pytest.raises(Ms4Error, match=r"nothing is left to train on: 1 sample is longer .* Raise"):
        run_stage(configure(sequence_length=32, too_long="drop"))


def test_without_fetched_weights(project: Path) -> None:
    write("train.jsonl", sample("a", "b"))
    Path("weights/source.json").unlink()
    with pytest.raises(Ms4Error, match=r"weights/source.json is missing: run `ms4 fetch`"):
        run_stage(configure())


def test_weights_without_a_tokenizer(project: Path, weights: Path) -> None:
    write("train.jsonl", sample("a", "b"))
    fetch(weights, files=[])
    with pytest.raises(Ms4Error, match=r"weights/source.json: lists no tekken.json. Remove it"):
        run_stage(configure())


def test_a_tokenizer_that_is_not_the_fetched_one(project: Path) -> None:
    write("train.jsonl", sample("a", "b"))
    directory = project / "weights/source"
    write_tekken(directory / "tekken.json", 4096)
    fetch(Path("weights/source"))
    text = (directory / "tekken.json").read_text()
    (directory / "tekken.json").write_text(text.replace('"AA=="', '"AQ=="', 1))
    with pytest.raises(Ms4Error, match=r"weights/source/tekken.json: content differs"):
        run_stage(configure())
    (directory / "tekken.json").write_text(text)
    run_stage(configure())


def test_the_command_exits_with_2_and_the_message(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text("data: {train: [train.jsonl]}\n")
    assert cli.main(["preprocess", "--config", "config.yaml"]) == 2
    message = capsys.readouterr().err
    assert message == (
        "ms4 preprocess: the data has a fault:\n"
        "  train.jsonl: no such file; correct its name (in a project: data.train or data.test)\n"
    )


# Readers.


def test_reading_what_is_not_packed_data(project: Path) -> None:
    path = project / "train.safetensors"
    with pytest.raises(Ms4Error, match=r"is missing: run `ms4 preprocess`"):
        load_packed(path)
    path.write_bytes(b"x" * 20)
    with pytest.raises(Ms4Error, match=r"damaged or cut short; run `ms4 preprocess` again"):
        load_packed(path)
    save_file({"tokens": np.zeros(3, dtype=np.int32)}, path)
    with pytest.raises(Ms4Error, match=r"not the tensors that it should hold"):
        load_packed(path)


def test_reading_what_is_not_a_test_set(project: Path) -> None:
    path = project / "test.jsonl"
    with pytest.raises(Ms4Error, match=r"cannot be read \(No such file or directory\); run"):
        list(read_test(path))
    for text in ("{", '{"set": "a"}', "[]"):
        path.write_text(f"{text}\n")
        with pytest.raises(Ms4Error, match=r"test.jsonl:1: not a line of `ms4 preprocess`"):
            list(read_test(path))


# What is shown.


def test_the_statement(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", sample("2+2?", "4", "2+2 = 4"), sample("a", "b"))
    write("test.jsonl", sample("x", "y"))
    run_stage(configure(test={"sums": "test.jsonl"}))
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(Path("results/data.json").read_text())["train"]
    share = result["trained_tokens"] / result["tokens"]
    assert lines == [
        "train.jsonl: OpenAI messages",
        f"training data: 2 samples (1 none, 1 high), {result['tokens']} tokens, "
        f"{share:.1%} of them trained",
        f"packed into 1 sequence of 2,048 tokens, {result['fill']:.1%} full; "
        f"the longest sample has {result['longest']} tokens",
        "held-out set sums: 1 sample",
        "what the model sees of train.jsonl:1, with ⟦what is trained⟧:",
        '<s>[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS][INST]2+2?[/INST]'
        "⟦[THINK]2+2 = 4[/THINK]4</s>⟧",
    ]


def test_a_long_example_is_cut_but_shows_what_is_trained(chat: Chat) -> None:
    record = sample("question " * 200, "answer " * 200)
    for _ in range(3):
        record["messages"] += sample("more " * 200, "and more " * 200)["messages"]
    text = dataset.render_example(chat, chat.encode(parse_record(record), "none"))
    assert len(text) == dataset.EXAMPLE_CHARACTERS + 2
    assert text.startswith('<s>[MODEL_SETTINGS]{"reasoning_effort": "none"}')
    assert "question [/INST]⟦answer answer" in text
    assert "answer</s>⟧[INST]more" in text


def test_no_torch_is_imported() -> None:
    code = "import sys, ms4.data.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_gsm8k(project: Path) -> None:
    """Public data at its real size: reasoning is the thinking, what follows #### the answer."""
    root = os.environ.get("MS4_TEST_DATA")
    if root is None:
        pytest.skip("MS4_TEST_DATA does not name the public data sets")
    for name in ("train", "test"):
        records = []
        for line in (Path(root) / f"gsm8k/{name}.jsonl").read_text().splitlines():
            problem = json.loads(line)
            thinking, answer = problem["answer"].split("####")
            records.append(sample(problem["question"], answer.strip(), thinking.strip()))
        write(f"{name}.jsonl", *records)
    run_stage(configure(test={"gsm8k": "test.jsonl"}, sequence_length=1024))
    result = json.loads(Path("results/data.json").read_text())
    assert result["train"]["by_effort"]["high"]["samples"] == 3000
    assert result["train"]["fill"] > 0.97
    assert result["test"]["gsm8k"]["samples"] == 300
    rows = list(read_test(Path("data/packed/test.jsonl")))
    assert len(rows) == 600
    assert all(row.answer.replace(",", "").lstrip("-").replace(".", "").isdigit() for row in rows)
