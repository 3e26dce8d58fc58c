"""The stages after the weights, in a row and in one process: packed data to report."""

import json
from pathlib import Path

import pytest

from ms4 import config
from ms4.cli import run_stage
from ms4.errors import Ms4Error
from ms4.manifest import check_files, read_json, read_manifest

ANSWER = "It is four."


def conversation(question):
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
    return json.dumps({"messages": said}) + "\n"


def test_what_is_trained_is_measured_and_reported(checkpoint, project):
    Path("train.jsonl").write_text("".join(conversation(f"And {n}?") for n in range(6)))
    Path("held.jsonl").write_text(conversation("And then?"))
    run = config.check(
        {
            "model": {"source": str(checkpoint)},
            "data": {
                "train": ["train.jsonl"],
                "test": {"held": "held.jsonl"},
                "sequence_length": 64,
                "reasoning": "none",
            },
            "train": {"steps": 2, "accumulation": 2, "learning_rate": 1e-2, "warmup": 0.0},
            "evaluate": {"efforts": ["none"], "max_new_tokens": 2},
            "run": {"device": "cpu", "threads": 1},
        },
        "test",
    )
    for stage in ("preprocess", "plan", "train", "evaluate", "deliver"):
        run_stage(stage, run)
    untuned, tuned = read_json(Path("results/evaluation.json"))["rows"]
    assert [untuned["model"], tuned["model"]] == ["untuned", "tuned"]
    assert tuned["loss"] < untuned["loss"] - 0.5
    # Settings that were changed since: what was made under the others is no input.
    other = run.model_copy(update={"adapters": run.adapters.model_copy(update={"rank": 3})})
    with pytest.raises(
        Ms4Error, match=r"results/train\.json: made before the configuration was ch"
    ):
        run_stage("evaluate", other)
    with pytest.raises(Ms4Error, match=r"results/plan\.json: made before .* or `ms4 plan`"):
        run_stage("train", other)
    delivered = read_manifest(Path("results/deliver.json"), "deliver")
    check_files(delivered, Path("results"), hashes=True)
