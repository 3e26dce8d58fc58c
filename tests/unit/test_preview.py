"""`ms4 data`: what it says is what training would make of the files, and nothing goes missing."""

from __future__ import annotations

import gzip
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4.data import preview
from ms4.data.chat import Chat
from ms4.data.conversation import Conversation, parse_record
from ms4.data.faults import LISTED
from ms4.data.histogram import by_fill, by_length, histogram
from ms4.data.packing import pack
from tests.chat_reference import png
from tests.examples import examples
from tests.unit.damaged import damaged_parquet
from tests.unit.projects import sample, write


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_a_cap_of_images_saves(data: Any) -> None:
    for name, size in (("a.png", (560, 280)), ("b.png", (100, 100))):
        Path(name).write_bytes(png(*size))
    question = [{"type": "text", "text": "?"}, *({"type": "image", "path": p} for p in "ab")]
    for part in question[1:]:
        part["path"] += ".png"
    answer = {"role": "assistant", "content": "!"}
    write("a.jsonl", {"messages": [{"role": "user", "content": question}, answer]})
    uncapped = 10 * 21 + 4 * 5
    for cap, tokens in ((280, 5 * 11 + 4 * 5), (1540, uncapped)):
        vision = ("--set", "data.modality=text_vision")
        arguments = (*vision, "--set", f"data.images.max_size={cap}", "a.jsonl")
        _, out, _ = data("--json", *arguments)
        found = json.loads(out)
        assert (found["images"], found["image_tokens"]) == (2, tokens)
        assert found["image_tokens_uncapped"] == uncapped
        _, out, _ = data(*arguments)
        assert f"2 images, {tokens} tokens in all" in out
        assert (f"({uncapped} if data.images.max_size did not cap them)" in out) == (cap == 280)
    # Training on text alone would refuse them.
    code, out, _ = data("a.jsonl")
    assert code == 2
    assert "a.jsonl:1: holds images, and data.modality is `text`; set it to `text_vision`" in out


def test_what_the_json_says(data: Any, chat: Chat) -> None:
    records = [sample("2+2?", "4", "2+2 = 4"), sample("a", "b"), sample("c", "d e f")]
    write("a.jsonl", records[0], "nonsense\n", *records[1:], {"id": 1})
    write("b.jsonl", {"question": "x", "answer": "y", "id": 7})
    code, out, _ = data("--json", "a.jsonl", "b.jsonl")
    assert code == 0
    found = json.loads(out)
    assert list(found)[:7] == [
        *("format", "records", "samples", "dropped", "faults", "tokens", "trained_tokens"),
    ]  # fmt: skip
    assert (found["format"], found["records"], found["samples"], found["dropped"]) == (
        "mixed",
        6,
        4,
        2,
    )
    assert [(f["file"], f["line"]) for f in found["faults"]] == [("a.jsonl", 2), ("a.jsonl", 5)]
    assert found["faults"][0]["reason"].startswith("not valid JSON: Expecting value")
    assert found["faults"][1]["reason"].startswith("no `messages` (its keys: `id`)")
    encoded = [
        chat.encode(parse_record(record), effort)  # type: ignore[arg-type]
        for record, effort in [
            *zip(records, ("high", "none", "none"), strict=True),
            (sample("x", "y"), "none"),
        ]
    ]
    lengths = np.array([len(e.tokens) for e in encoded])
    assert found["tokens"] == lengths.sum()
    assert found["trained_tokens"] == sum(int(e.trained.sum()) for e in encoded)
    assert found["turns"] == 4
    assert {e: c["samples"] for e, c in found["by_effort"].items()} == {"none": 3, "high": 1}
    assert found["files"] == {
        "a.jsonl": {"format": "messages", "records": 5, "samples": 3, "unused": ["id"]},
        "b.jsonl": {"format": "question_answer", "records": 1, "samples": 1, "unused": ["id"]},
    }
    assert found["lengths"]["longest"] == lengths.max()
    assert found["packing"] == {
        "sequence_length": 2048,
        "sequences": 1,
        "fill": round(int(lengths.sum()) / 2048, 6),
    }
    assert found["steps"] == 1
    assert 0 < found["hours"]["H200 SXM"] < found["hours"]["H100 SXM"] < 1
    assert sorted(path.name for path in Path().iterdir()) == ["a.jsonl", "b.jsonl"]


def test_what_the_report_says(data: Any) -> None:
    write("a.jsonl", *[sample(f"{n}?", "yes " * n, "hm" if n % 2 else None) for n in range(1, 90)],
          "[]\n")  # fmt: skip
    code, out, _ = data("--set", "data.sequence_length=256", "a.jsonl")
    assert code == 0
    lines = out.splitlines()
    assert lines[:2] == [
        "a.jsonl: OpenAI messages, 90 records",
        "90 records: 89 samples, 1 dropped",
    ]
    assert lines[2].startswith("89 turns of the assistant, ")
    assert lines[3].startswith("effort none: 44 samples, ")
    assert lines[4].startswith("effort high: 45 samples, ")
    text = "\n".join(lines)
    assert "tokens of a sample: half have at most " in text
    assert "packing: " in text
    assert "sequences of 256 tokens, " in text
    assert "training: 6 steps (1 × 8 sequences each)" in text
    assert "hours, estimated from published ceilings: " in text
    assert lines[-2] == "1 fault (all in ms4-data-faults.txt):"
    assert lines[-1].startswith("  a.jsonl:90: a list instead of an object")
    assert Path("ms4-data-faults.txt").read_text() == lines[-1].strip() + "\n"
    # What was mended leaves no report behind.
    write("a.jsonl", sample("a", "b"))
    Path("ms4-data-faults.txt").unlink()
    data("a.jsonl")
    assert not Path("ms4-data-faults.txt").exists()


def test_twenty_faults_are_shown_and_all_are_written(data: Any) -> None:
    assert LISTED == 20
    write("a.jsonl", sample("a", "b"), *["{}\n"] * (LISTED + 5))
    code, out, _ = data("a.jsonl")
    assert code == 0
    assert out.count("a.jsonl:") == LISTED + 1
    assert out.splitlines()[-1] == "  and 5 more (all in ms4-data-faults.txt)"
    assert len(Path("ms4-data-faults.txt").read_text().splitlines()) == LISTED + 5


def test_in_a_project_the_faults_go_where_preprocess_puts_them(data: Any) -> None:
    Path("config").mkdir()
    Path("config/config.yaml").write_text("")
    write("a.jsonl", "{}\n")
    data("a.jsonl")
    assert Path("data/faults.txt").read_text().startswith("a.jsonl:1: no `messages`")


def test_nothing_usable(data: Any) -> None:
    write("a.jsonl", "{}\n", "{}\n")
    code, out, _ = data("a.jsonl")
    assert code == 2
    assert "2 records: 0 samples, 2 dropped" in out
    assert out.splitlines()[-1] == (
        "nothing can be used: correct the faults, or declare data.format or data.fields"
    )
    code, out, _ = data("--json", "a.jsonl")
    assert code == 2
    found = json.loads(out)
    assert (found["records"], found["samples"], found["dropped"], found["steps"]) == (2, 0, 2, 0)
    code, out, _ = data("--json", "gone.jsonl")
    assert code == 2
    found = json.loads(out)
    assert (found["records"], found["samples"], found["dropped"]) == (0, 0, 0)
    assert found["faults"] == [
        {
            "file": "gone.jsonl",
            "line": None,
            "reason": "no such file; correct its name (in a project: data.train or data.test)",
        }
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show", "0"], "--show 0: samples are numbered from 1"),
        (["--show", "3"], "--show 3: the data has 2 samples that can be used"),
        (
            ["--set", "data.formt=x"],
            "--set data.formt: unknown key `formt`; did you mean `format`?",
        ),
        (["--set", "data.format=x"], "--set data.format: Input should be 'auto', 'messages', "),
        (["--config", "none.yaml"], "none.yaml"),
        (["hub:a/b"], "hub:a/b: not a data set of the hub with a revision"),
    ],
)
def test_what_is_wrong_with_the_command(arguments: list[str], message: str, data: Any) -> None:
    write("a.jsonl", sample("a", "b"), sample("c", "d"))
    code, out, err = data(*arguments, "a.jsonl")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_tokenizer_that_is_none(data: Any) -> None:
    write("a.jsonl", sample("a", "b"))
    Path("tekken.json").write_text("{}")
    code, _, err = data("a.jsonl", tokenizer=Path("tekken.json"))
    assert code == 2
    assert "tekken.json" in err


def test_efforts(data: Any) -> None:
    write("a.jsonl", sample("a", "b"), sample("c", "d", "e"), sample("f", "g", "h", mode="none"))
    found = json.loads(data("--json", "a.jsonl")[1])
    assert found["by_effort"]["high"]["samples"] == 2
    found = json.loads(data("--json", "--effort", "per-sample", "a.jsonl")[1])
    assert found["by_effort"]["high"]["samples"] == 2
    found = json.loads(data("--json", "--effort", "none", "a.jsonl")[1])
    assert (found["samples"], found["dropped"]) == (1, 2)
    assert "holds thinking, but data.reasoning is `none`" in found["faults"][0]["reason"]
    found = json.loads(data("--json", "--effort", "high", "a.jsonl")[1])
    assert (found["samples"], found["dropped"]) == (2, 1)
    mended = ("--set", "data.thinking={under_none: fix}", "--set", "data.fields={effort: mode}")
    found = json.loads(data("--json", *mended, "a.jsonl")[1])
    assert found["thinking"] == {"under_none fix": 1}
    assert {e: c["samples"] for e, c in found["by_effort"].items()} == {"none": 2, "high": 1}
    warned = json.loads(
        data("--json", "--effort", "high", "--set", "data.thinking={missing: warn}", "a.jsonl")[1]
    )
    assert {kind: count["samples"] for kind, count in warned["by_kind"].items()} == {
        "high": 2,
        "high, without thinking": 1,
    }


def test_how_many_of_each_kind_and_their_shares(data: Any, chat: Chat) -> None:
    thinks, plain = sample("2+2?", "4", "2+2 = 4"), sample("a", "b c d")
    write("a.jsonl", {**thinks, "reasoning_effort": "none"}, {**plain, "reasoning_effort": "high"},
          thinks, thinks, plain, {"messages": []})  # fmt: skip
    write("b.jsonl", {"text": "e f g"})
    policies = ["--set", "data.thinking={under_none: warn, missing: warn}", "a.jsonl", "b.jsonl"]
    found = json.loads(data("--json", *policies)[1])
    encoded = {
        "none": [chat.encode(parse_record(plain), "none")],
        "none, with thinking": [chat.encode(parse_record(thinks), "none")],
        "high": [chat.encode(parse_record(thinks), "high")] * 2,
        "high, without thinking": [chat.encode(parse_record(plain), "high")],
        "plain text": [chat.encode(Conversation((), plain="e f g"), "none")],
    }
    counts = {
        kind: {
            "samples": len(them),
            "tokens": sum(len(e.tokens) for e in them),
            "trained_tokens": sum(int(e.trained.sum()) for e in them),
        }
        for kind, them in encoded.items()
    }
    assert found["by_kind"] == counts
    for effort, kinds in {
        "none": ["none", "none, with thinking", "plain text"],
        "high": ["high", "high, without thinking"],
    }.items():
        assert found["by_effort"][effort] == {
            name: sum(counts[kind][name] for kind in kinds)
            for name in ("samples", "tokens", "trained_tokens")
        }
    report = data(*policies)[1]
    for kind in ("none, with thinking", "high, without thinking", "plain text"):
        share = counts[kind]["tokens"] / found["tokens"]
        assert f"{kind}: 1 sample, {share:.1%} of the tokens" in report
    share = found["by_effort"]["high"]["tokens"] / found["tokens"]
    assert f"effort high: 3 samples, {share:.1%} of the tokens" in report


def test_costs_follow_the_settings(data: Any) -> None:
    write("a.jsonl", *[sample(f"{n}?", "yes") for n in range(16)])

    def costs(*settings: str) -> tuple[int, int, float]:
        options = [word for setting in settings for word in ("--set", setting)]
        found = json.loads(data("--json", "a.jsonl", *options)[1])
        return found["packing"]["sequences"], found["steps"], found["hours"]["H200 SXM"]

    sequences, steps, hours = costs("data.packing=none", "train.epochs=100")
    assert (sequences, steps) == (16, 200)
    fewer = costs("data.packing=none", "train.epochs=100", "train.accumulation=4")
    assert fewer == (16, 400, pytest.approx(hours, rel=0.01))
    assert costs("train.epochs=100")[0] == 1


def test_a_configuration_file_decides(data: Any) -> None:
    write("a.jsonl", sample("a", "b " * 50), sample("c", "d"))
    Path("c.yaml").write_text(
        "data: {train: [o.jsonl], test: {t: o.jsonl}, sequence_length: 32, too_long: drop}\n"
        "evaluate: {min_exact_match: {t: 0.5}}\n"
    )
    found = json.loads(data("--json", "--config", "c.yaml", "a.jsonl")[1])
    assert (found["records"], found["samples"], found["too_long"]) == (2, 1, 1)
    assert found["packing"]["sequence_length"] == 32


def test_truncated_samples_are_samples(data: Any) -> None:
    long = sample("a", "b")
    long["messages"] += sample("c", "d " * 50)["messages"]
    write("a.jsonl", long, sample("x", "y " * 50))
    settings = ("--set", "data.sequence_length=32", "--set", "data.too_long=truncate")
    found = json.loads(data("--json", *settings, "a.jsonl")[1])
    assert (found["records"], found["samples"], found["dropped"]) == (2, 1, 1)
    assert (found["truncated"], found["too_long"], found["turns"]) == (1, 1, 1)
    assert (
        "no turn of the assistant ends within data.sequence_length 32"
        in (found["faults"][0]["reason"])
    )


def test_halves_of_surrogate_pairs_are_replaced_and_counted(data: Any) -> None:
    write("a.jsonl", sample("\ud83d?", "x\udc00", "\ud83d\ude00"), sample("a", "b "))
    found = json.loads(data("--json", "a.jsonl")[1])
    assert (found["records"], found["samples"], found["faults"]) == (2, 2, [])
    assert found["changed"] == {"surrogates": 2, "trailing_spaces": 1}
    assert "[INST]\ufffd?[/INST]⟦[THINK]😀[/THINK]x\ufffd</s>⟧" in data("--show", "1", "a.jsonl")[1]
    assert "halves of surrogate pairs become U+FFFD (2 times)" in data("a.jsonl")[1]


def test_a_sample_is_shown_as_the_model_sees_it(data: Any) -> None:
    write("a.jsonl", "nonsense\n", sample("a", "b"), sample("2+2?\x1b[31m", "4", "2+2 = 4"))
    code, out, _ = data("--show", "2", "a.jsonl")
    assert code == 0
    head, text = out.splitlines()
    assert head.startswith("sample 2, a.jsonl:3: effort high, ")
    assert text == (
        '<s>[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS][INST]2+2?\\x1b[31m[/INST]'
        "⟦[THINK]2+2 = 4[/THINK]4</s>⟧"
    )
    found = json.loads(data("--json", "--show", "1", "a.jsonl")[1])
    assert found["shown"]["place"] == "a.jsonl:2"
    assert found["shown"]["text"].endswith("[INST]a[/INST]⟦b</s>⟧")


def test_on_a_terminal_what_is_trained_is_coloured(tekken: Path) -> None:
    write("a.jsonl", sample("a", "b"))
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "ms4", "data", "--tokenizer", str(tekken), "--show", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    subprocess.run([*command, "a.jsonl"], check=True, stdout=terminal, env=environment)
    os.close(terminal)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    assert "[INST]a[/INST]\x1b[1;32mb</s>\x1b[0m" in shown


@pytest.mark.slow
def test_without_a_checkpoint_and_without_torch() -> None:
    """The light install: the vocabulary is the one that mistral-common ships."""
    write("a.jsonl", sample("Guten Morgen", "Good morning"))
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pyarrow', 'datasets', 'zstandard'):\n"
        "    sys.modules[name] = None\n"
        "from ms4.cli import main\n"
        "sys.exit(main(['data', '--json', 'a.jsonl']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["samples"], found["trained_tokens"]) == (1, 3)
    assert done.stderr == ""


# Nothing goes missing.


def test_what_a_damaged_file_has_lost_is_counted(data: Any) -> None:
    write("cut.json", "[" + json.dumps(sample("a", "b")) + ",\n{}")
    texts = [{"text": str(number) * 50} for number in range(400)]
    damaged_parquet(Path("damaged.parquet"), texts, 100)
    code, out, _ = data("--json", "cut.json", "damaged.parquet")
    assert code == 0
    found = json.loads(out)
    files = {name: (file["records"], file["samples"]) for name, file in found["files"].items()}
    read = files["damaged.parquet"][1]
    assert files == {"cut.json": (2, 1), "damaged.parquet": (400, read)}
    assert 100 <= read < 300
    assert (found["records"], found["samples"]) == (402, 1 + read)
    assert found["dropped"] == 401 - read
    lines = [(fault["file"], fault["line"]) for fault in found["faults"]]
    assert lines == [("cut.json", None), ("cut.json", 2), ("damaged.parquet", read + 1)]


pieces = st.one_of(
    st.just(sample("a", "b")),
    st.just(sample("a", "b", "c")),
    st.just(sample("a", "b " * 60)),
    st.just(sample("a", "")),
    st.just({"messages": []}),
    st.just({"question": "a", "answer": "b"}),
    st.just({"text": "a b c"}),
    st.just({"text": "a " * 200}),
    st.just(3),
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_records_are_samples_or_dropped(name: str, chat: Chat, tmp_path: Path) -> None:
    @settings(
        deadline=None,
        max_examples=examples(40),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        st.lists(pieces, min_size=1, max_size=8),
        st.sampled_from(["auto", "messages", "text", "question_answer"]),
        st.sampled_from(["error", "drop", "truncate"]),
        st.sampled_from(["none", "high", "per_sample"]),
        st.sampled_from(["error", "warn", "drop", "fix"]),
    )
    def run(records: list[Any], format: str, too_long: str, effort: str, policy: str) -> None:
        lines = [json.dumps(record) for record in records]
        text = f"[{','.join(lines)}]" if name == "a.json" else "\n".join(lines)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        config = preview.read_settings(
            [str(path)],
            None,
            [
                f"data.format={format}",
                f"data.too_long={too_long}",
                "data.sequence_length=64",
                f"data.thinking={{under_none: {policy}, missing: {policy}}}",
            ],
            effort,
        )
        found = preview.survey(config, chat, preview.expand(config.data.train))
        tally = found.tally
        assert tally.records == len(records) == tally.samples + tally.dropped
        assert len(found.faults) == tally.dropped
        assert sum(c["samples"] for c in tally.by_effort.values()) == tally.samples
        assert len(tally.lengths) == tally.samples
        assert found.filled.sum() == tally.tokens
        assert found.filled.max(initial=0) <= 64

    run()


def test_weights_and_long_texts(chat: Chat) -> None:
    write("a.jsonl", {"text": "a b c d e f g h " * 40})
    write("b.jsonl", sample("a", "b"))
    config = preview.read_settings(
        ["a.jsonl", "b.jsonl"], None, ["data.sequence_length=64", "data.weights={b.jsonl: 3}"], None
    )
    found = preview.survey(config, chat, preview.expand(config.data.train))
    text = chat.encode(
        preview.find_sample(config, chat, preview.expand(["a.jsonl"]), 1)[1].conversation
        or parse_plain("a b c d e f g h " * 40),
        "none",
    )
    other = len(chat.encode(parse_record(sample("a", "b")), "none").tokens)
    assert found.filled.sum() == len(text.tokens) + 3 * other


def parse_plain(text: str) -> Any:
    from ms4.data.conversation import Conversation

    return Conversation(messages=(), plain=text)


# Histograms.


def test_histograms_count_everything() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 1023, 1024])
    rows = by_length(lengths)
    assert rows[0] == ("1 to 1", 1)
    assert rows[1] == ("2 to 3", 2)
    assert rows[-1] == ("1,024 to 2,047", 1)
    assert sum(number for _, number in rows) == len(lengths)
    assert by_length(np.zeros(0, dtype=np.int64)) == []
    filled = np.array([10, 55, 97, 99, 100, 100])
    assert sum(number for _, number in by_fill(filled, 100)) == 6
    assert by_fill(filled, 100)[-1] == ("full", 2)
    lines = histogram(rows)
    assert len({line.index("█") for line in lines if "█" in line}) == 1
    assert histogram([]) == []
    assert pack(np.array([1]), 2)[1].tolist() == [0, 1]
