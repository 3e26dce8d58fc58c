"""Data with images through the stages preprocess, plan and train."""

import hashlib
import json
from pathlib import Path

import pytest

from ms4 import config
from ms4.cli import run_stage
from ms4.data.image_store import ImageStore
from ms4.data.packed import load_packed, read_test
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4.report.record import read_lines
from tests.chat_reference import png

PACKED = Path("data/packed/train.safetensors")
IMAGES = Path("data/packed/images.safetensors")
SIZES = [(40, 30), (28, 28), (90, 60), (300, 100)]


def settings(checkpoint, **data):
    return config.check(
        {
            "model": {"source": str(checkpoint)},
            "data": {
                "train": ["train.jsonl"],
                "sequence_length": 128,
                "modality": "text_vision",
                "images": {"max_size": 112},
                **data,
            },
            "adapters": {"targets": ["attention"], "rank": 4},
            "train": {"steps": 3, "accumulation": 2, "learning_rate": 3e-3},
            "run": {"device": "cpu", "threads": 1},
        },
        "test",
    )


@pytest.fixture
def with_images(project):
    """The project with a data file: images by path, and one conversation without any."""
    lines = []
    for number, size in enumerate(SIZES):
        (project / f"{number}.png").write_bytes(png(*size, number))
    for shown in ([0], [], [1, 2], [2, 0], [3], [0]):
        content = [{"type": "image", "path": f"{number}.png"} for number in shown]
        content.append({"type": "text", "text": f"How many? {len(lines)}"})
        answer = {"role": "assistant", "content": f"I count {len(shown)}."}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (project / "train.jsonl").write_text("\n".join(lines) + "\n")
    return project


def test_images_are_stored_once_and_trained_with(checkpoint, with_images):
    run = settings(checkpoint)
    run_stage("preprocess", run)
    made = read_json(Path("results/data.json"))
    assert str(IMAGES) in {entry["path"] for entry in made["files"]}
    store = ImageStore(IMAGES)
    assert len(store) == 4
    images = made["train"]["images"]
    assert images["distinct"] == 4
    # Breaks included; without the cap the larger ones would take more.
    shown = [store.grids[image] for number in range(6) for image in store.document(number)]
    assert images["image_tokens"] == sum((columns + 1) * rows for columns, rows in shown)
    assert images["image_tokens_uncapped"] > images["image_tokens"]
    assert [store.document(number) for number in range(6)] == [[0], [], [1, 2], [2, 0], [3], [0]]
    data = load_packed(PACKED)
    for number in range(data.documents):
        tokens, trained = data.document(number)
        grids = [store.grids[image].tolist() for image in store.document(number)]
        assert (tokens == 10).sum() == sum(columns * rows for columns, rows in grids)
        assert not trained[(tokens >= 10) & (tokens <= 13)].any()
    run_stage("plan", run)
    run_stage("train", run)
    trained = read_json(Path("results/train.json"))
    assert trained["steps"] == 3
    lines = Path("results/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]

    # Other pixels, the same everything else: the loss is another one, so the images are seen.
    for number, size in enumerate(SIZES):
        (with_images / f"{number}.png").write_bytes(png(*size, number + 50))
    before = hashlib.sha256(PACKED.read_bytes()).hexdigest()
    run_stage("preprocess", run)
    assert hashlib.sha256(PACKED.read_bytes()).hexdigest() == before
    run_stage("train", run)
    others = Path("results/metrics.jsonl").read_text().splitlines()
    assert json.loads(others[0])["loss"] != losses[0]


def test_images_in_held_out_sets(checkpoint, with_images):
    """In a set of their own and in what is held out of the training data, each stored once."""
    lines = Path("train.jsonl").read_text().splitlines()
    Path("held.jsonl").write_text(lines[2].replace("How many", "And here") + "\n")
    run = settings(checkpoint, test={"held": "held.jsonl"}, holdout=0.4)
    run = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"max_new_tokens": 3})})
    for stage in ("preprocess", "plan", "train", "evaluate", "deliver"):
        run_stage(stage, run)
    store = ImageStore(IMAGES)
    assert len(store) == 4
    held = list(read_test(Path("data/packed/test.jsonl")))
    assert held[0].images == held[1].images
    digests = [bytes(store.sha256[number]) for number in held[0].images]
    assert digests == [hashlib.sha256(Path(f"{n}.png").read_bytes()).digest() for n in (1, 2)]
    assert any(sample.set == "holdout" and sample.images for sample in held)
    for sample in held:
        cells = sum(int(store.grids[number].prod()) for number in sample.images)
        assert sample.prompt.count(10) == cells
        assert sample.tokens is None or sample.tokens.count(10) == cells
    made = read_json(Path("results/evaluation.json"))
    assert {row["set"] for row in made["rows"]} == {"held", "holdout"}
    rows = [row for row in made["rows"] if row["loss"] is not None]
    assert all(0 < row["loss"] < 20 for row in rows)
    asked = read_lines(Path("results/evaluation/examples.jsonl"))
    (question,) = {
        line["question"] for line in asked if line["set"] == "held" and line["effort"] == "none"
    }
    assert question.count("[IMG]") == 2
    assert "[IMG_" not in question

    # Other pixels of the held-out images, the same everything else: other losses.
    for number in (1, 2):
        Path(f"{number}.png").write_bytes(png(*SIZES[number], number + 50))
    for stage in ("preprocess", "train", "evaluate"):
        run_stage(stage, run)
    again = read_json(Path("results/evaluation.json"))["rows"]
    assert again[0]["loss"] != made["rows"][0]["loss"]


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_processes(checkpoint, with_images):
    found = []
    for threads in (1, 3):
        run = settings(checkpoint)
        run = run.model_copy(update={"run": run.run.model_copy(update={"threads": threads})})
        run_stage("preprocess", run)
        found.append([path.read_bytes() for path in (PACKED, IMAGES)])
    assert found[0] == found[1]


def test_images_that_cannot_be_had_are_faults_with_their_places(checkpoint, with_images):
    lines = Path("train.jsonl").read_text().splitlines()
    bad = {
        "missing.png": "no image at 'missing.png'",
        "../outside.png": "leads out of the data's directory",
        "http://127.0.0.1:1/x.png": "would have to be fetched",
        "cut.png": "damaged or cut short",
    }
    Path("cut.png").write_bytes(png(40, 30)[:-200])
    for path in bad:
        lines.append(lines[0].replace("0.png", path))
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(Ms4Error, match="the data has 4 faults") as caught:
        run_stage("preprocess", settings(checkpoint))
    for number, told in enumerate(bad.values(), 7):
        assert f"train.jsonl:{number}: message 1 (user): " in str(caught.value)
        assert told in str(caught.value)
    assert not PACKED.exists()
    assert not IMAGES.exists()
    assert not list(Path("data/packed").glob(".*"))


def test_without_the_modality_images_are_faults(checkpoint, with_images):
    with pytest.raises(Ms4Error, match=r"train\.jsonl:1: .*image"):
        run_stage("preprocess", settings(checkpoint, modality="text"))
