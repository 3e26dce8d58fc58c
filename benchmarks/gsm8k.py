"""The pipeline on real text: GSM8K, the reasoning before `####` as thinking, through every stage.

MS4_TEST_DATA names the directory that holds gsm8k/train.jsonl and gsm8k/test.jsonl. An argument
names a checkpoint to start from; without one the tiny model is made first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_project, public_data, record, run

TRAIN, TEST = 500, 50


def convert(source: Path, target: Path, count: int) -> None:
    """The first `count` problems as OpenAI messages with thinking."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines()[:count]:
        problem = json.loads(line)
        thinking, answer = problem["answer"].rsplit("####", 1)
        parts = [
            {"type": "thinking", "thinking": thinking.strip()},
            {"type": "text", "text": answer.strip()},
        ]
        messages = [
            {"role": "user", "content": problem["question"]},
            {"role": "assistant", "content": parts},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    target.write_text("".join(lines), encoding="utf-8")


def answers(values: dict[str, Any], place: Path, source: str) -> None:
    """GSM8K in place of the demo's data, and a model."""
    values["model"]["source"] = source
    values["data"] |= {
        "train": [str(place / "train.jsonl")],
        "test": {"gsm8k": str(place / "test.jsonl")},
        "sequence_length": 1024,
    }
    values["train"] |= {"epochs": 2, "micro_batch": 2, "learning_rate": 2e-3}
    values["evaluate"] |= {"min_exact_match": {}, "max_new_tokens": 64, "batch": 50}


def main() -> None:
    """Run the pipeline and record that the loss falls."""
    data = public_data("gsm8k", required=False)
    if data is None:
        return
    source = str(Path(sys.argv[1]).resolve()) if len(sys.argv) > 1 else "tiny"
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        convert(data / "gsm8k/train.jsonl", place / "train.jsonl", TRAIN)
        convert(data / "gsm8k/test.jsonl", place / "test.jsonl", TEST)
        project = make_project(place / "gsm8k", lambda values: answers(values, place, source))
        spent = run(project, "snakemake", "--profile", "local")
        evaluation = json.loads((project / "results/evaluation.json").read_text())
        trained = json.loads((project / "results/train.json").read_text())
        packed = json.loads((project / "results/data.json").read_text())["train"]
    keys = ("effort", "model", "samples", "loss", "exact_match", "well_formed")
    rows = [{key: row[key] for key in keys} for row in evaluation["rows"]]
    record(
        "gsm8k",
        "500 training and 50 test problems of GSM8K run to the end, and the held-out loss falls.",
        {
            **spent,
            "steps": trained["steps"],
            "train_loss": [trained["first_loss"], trained["last_loss"]],
            "packed": packed,
            "rows": rows,
        },
    )
    losses = {row["model"]: row["loss"] for row in rows if row["effort"] == "high"}
    assert losses["tuned"] < losses["untuned"], losses


if __name__ == "__main__":
    main()
