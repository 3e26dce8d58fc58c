"""Stage evaluate: the untuned and the tuned model on every held-out set, in both reasoning efforts.

Held-out loss, exact match of the answer, and whether thinking is well formed. Each set, effort and
model is a piece of its own, kept under results/evaluation/, so that a kill loses one of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ms4 import spec
from ms4.config import RunConfig
from ms4.data.chat import Chat
from ms4.data.image_store import ImageStore
from ms4.data.packed import TestSample, read_test
from ms4.evaluate.generate import answer, mean_loss
from ms4.manifest import (
    check_files,
    file_entry,
    read_inputs,
    read_json,
    sha256_json,
    write_json,
    write_manifest,
    write_text,
)
from ms4.model import lora
from ms4.model.build import choose_device, load_model, prepare_torch
from ms4.progress import track
from ms4.train.loop import ADAPTER, BASE, open_images

OUTPUT = Path("results/evaluation.json")
DIRECTORY = Path("results/evaluation")
EXAMPLES = DIRECTORY / "examples.jsonl"
INPUTS = {
    "descale": Path("weights/base.json"),
    "train": Path("results/train.json"),
    "preprocess": Path("results/data.json"),
}
MODELS = ("untuned", "tuned")


def _measure(
    model: Any,
    chat: Chat,
    samples: Sequence[TestSample],
    images: ImageStore | None,
    config: RunConfig,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One piece: its row of the table, and what was generated."""
    settings = config.evaluate
    loss, tokens = mean_loss(model, samples, images, settings.batch, config.train.loss_chunk)
    # Longest prompts together: less padding, and the batch that may not fit comes first.
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].prompt))
    written: dict[int, list[int]] = {}
    for start in range(0, len(order), settings.batch):
        group = order[start : start + settings.batch]
        answers = answer(model, [samples[i] for i in group], images, settings.max_new_tokens)
        written.update(zip(group, answers, strict=True))
    records: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        thinking, text, well_formed = chat.decode_answer(written[index], sample.effort)
        records.append(
            {
                "set": sample.set,
                "effort": sample.effort,
                "line": sample.line,
                "question": chat.decode_question(sample.prompt),
                "expected": sample.answer,
                "thinking": thinking,
                "answer": text,
                "exact": text == sample.answer,
                "well_formed": well_formed,
            }
        )
    row = {
        "samples": len(samples),
        "loss": loss,
        "loss_tokens": tokens,
        "exact_match": sum(record["exact"] for record in records) / len(records),
        "well_formed": sum(record["well_formed"] for record in records) / len(records),
    }
    return row, records


def verdict(rows: Sequence[dict[str, Any]], wanted: dict[str, float]) -> tuple[str, list[str]]:
    """`pass`, `fail` or `none` (nothing is demanded), and each threshold that was missed."""
    failures = [
        f"{row['set']}, effort {row['effort']}: exact match {row['exact_match']:.1%}, "
        f"wanted {wanted[row['set']]:.1%}"
        for row in rows
        if row["model"] == "tuned"
        and row["set"] in wanted
        and row["exact_match"] < wanted[row["set"]]
    ]
    if not wanted:
        return "none", []
    return ("fail" if failures else "pass"), failures


def run_stage(config: RunConfig) -> None:
    """Evaluate, and write `results/evaluation.json`."""
    manifests = read_inputs(INPUTS, config)
    for stage, root in (("descale", BASE), ("train", Path()), ("preprocess", Path())):
        check_files(manifests[stage], root)
    chat = Chat(BASE / "tekken.json")
    sets: dict[tuple[str, str], list[TestSample]] = {}
    for sample in read_test(Path("data/packed/test.jsonl")):
        group = sets.setdefault((sample.set, sample.effort), [])
        if sample.effort in config.evaluate.efforts and (len(group) < config.evaluate.max_samples):
            group.append(sample)
    sets = {key: group for key, group in sets.items() if group}

    images = open_images(manifests["preprocess"])
    device, dtype, why = choose_device(config.run)
    print(f"evaluate: on {why}")
    prepare_torch(config.run, config.seed)
    dense = config.model.dense_on(device.type)
    model = load_model(BASE, manifests["descale"]["experts"], device, dtype, dense)
    lora.add_adapters(model, config.adapters, spec.read_dimensions(BASE))
    lora.load(model, ADAPTER)
    model.eval()

    made_from = sha256_json([config.part_hash("evaluate"), *manifests.values()])
    rows, examples, entries = [], [], []
    pieces = [(*key, name) for key in sets for name in MODELS]
    for name, effort, which in track(pieces, "evaluate"):
        path = DIRECTORY / f"{name}-{effort}-{which}.json"
        piece = read_json(path) if path.exists() else {}
        if piece.get("made_from") != made_from:
            with lora.without_adapters(model) if which == "untuned" else nullcontext():
                row, records = _measure(model, chat, sets[name, effort], images, config)
            piece = {"made_from": made_from, "row": row, "answers": records}
            write_json(path, piece)
        rows.append({"set": name, "effort": effort, "model": which, **piece["row"]})
        examples += [{**record, "model": which} for record in piece["answers"]]
        entries.append(path)
    write_text(EXAMPLES, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in examples))
    outcome, failures = verdict(rows, config.evaluate.min_exact_match)
    write_manifest(
        OUTPUT,
        "evaluate",
        config_hash=config.part_hash("evaluate"),
        inputs=INPUTS.values(),
        files=[file_entry(path, Path()) for path in (*entries, EXAMPLES)],
        rows=rows,
        verdict=outcome,
        failures=failures,
    )
    print(f"evaluate: {len(rows)} rows, verdict {outcome}" + "".join(f"\n  {f}" for f in failures))
