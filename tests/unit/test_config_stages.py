"""The configuration: which stages a change reruns, and where its weights are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from ms4 import config
from ms4.errors import Ms4Error

# Which stages a change reruns.


CHANGES: list[tuple[str, object, set[str]]] = [
    ("seed", 7, {"fetch", "train"}),
    ("model.source", "./elsewhere", {"fetch"}),
    ("model.experts", "bf16", {"descale", "plan"}),
    ("model.softmax_scale", "yarn", {"descale"}),
    ("data.train", ["other.jsonl"], {"preprocess"}),
    ("data.test", {"seal": "a", "chat": "b", "copy": "c"}, {"preprocess"}),
    ("data.reasoning", "none", {"preprocess"}),
    ("data.sequence_length", 512, {"preprocess", "plan"}),
    ("data.too_long", "drop", {"preprocess"}),
    ("adapters.targets", ["attention"], {"plan", "train"}),
    ("adapters.rank", 4, {"plan", "train"}),
    ("adapters.alpha", 5.0, {"plan", "train"}),
    ("adapters.expert_rank", 4, {"plan", "train"}),
    ("adapters.rslora", True, {"plan", "train"}),
    ("adapters.dropout", 0.1, {"plan", "train"}),
    ("train.checkpointing", "selective", {"plan", "train"}),
    ("train.optimizer", "adamw_8bit", {"plan", "train"}),
    ("train.steps", 3, {"plan", "train"}),
    ("train.learning_rate", 1e-5, {"plan", "train"}),
    ("train.checkpoint_every", 7, {"plan", "train"}),
    ("evaluate.efforts", ["none"], {"evaluate"}),
    ("evaluate.max_samples", 3, {"evaluate"}),
    ("evaluate.min_exact_match", {}, {"evaluate"}),
    ("run.device", "cuda", {"plan", "train", "evaluate"}),
    ("run.threads", 3, {"fetch", "plan", "train", "evaluate"}),
    ("run.memory_gib", 3.0, {"plan"}),
]


def changed(values: dict[str, Any], field: str, value: object) -> dict[str, Any]:
    tree = copy.deepcopy(values)
    *way, last = field.split(".")
    node = tree
    for name in way:
        node = node[name]
    assert node[last] != value, "no change"
    node[last] = value
    return tree


def rerun(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    one, other = config.check(before, "before"), config.check(after, "after")
    return {stage for stage in config.STAGES if one.part_hash(stage) != other.part_hash(stage)}


@pytest.mark.parametrize(("field", "value", "stages"), CHANGES)
def test_change_reruns(
    demo_values: dict[str, Any], field: str, value: object, stages: set[str]
) -> None:
    assert rerun(demo_values, changed(demo_values, field, value)) == stages


def test_seed_and_threads_do_not_touch_weights_that_are_not_made_here(
    demo_values: dict[str, Any],
) -> None:
    values = changed(demo_values, "model.source", "owner/name")
    assert rerun(values, changed(values, "seed", 7)) == {"train"}
    assert rerun(values, changed(values, "run.threads", 3)) == {"plan", "train", "evaluate"}
    assert rerun(values, changed(values, "model.revision", "abc")) == {"fetch"}


def test_a_source_that_is_freed_is_converted_when_it_is_fetched(
    demo_values: dict[str, Any],
) -> None:
    values = changed(demo_values, "model.source", "owner/name")
    assert rerun(values, changed(values, "model.layout", "native")) == {"fetch"}
    freed = changed(values, "model.free_source", True)
    assert rerun(values, freed) == {"fetch"}
    assert rerun(freed, changed(freed, "model.experts", "bf16")) == {"fetch", "descale", "plan"}
    assert rerun(freed, changed(freed, "model.softmax_scale", "yarn")) == {"descale"}


def test_hashes_differ_between_stages_and_not_between_calls(demo_values: dict[str, Any]) -> None:
    loaded = config.check(demo_values, "demo")
    hashes = {stage: loaded.part_hash(stage) for stage in config.STAGES if loaded.part(stage)}
    assert len(set(hashes.values())) == len(hashes)
    again = config.check(copy.deepcopy(demo_values), "demo")
    assert {stage: again.part_hash(stage) for stage in hashes} == hashes


# Where the weights are.


@pytest.mark.parametrize(
    ("source", "local"),
    [
        ("tiny", None),
        ("owner/name", None),
        ("./here", Path("here")),
        ("../there", Path("../there")),
        ("/an/absolute/path", Path("/an/absolute/path")),
        ("here", Path("here")),
        ("a/b/c", Path("a/b/c")),
        ("~/weights", Path.home() / "weights"),
    ],
)
def test_source(demo_values: dict[str, Any], source: str, local: Path | None) -> None:
    demo_values["model"]["source"] = source
    assert config.check(demo_values, "demo").resolve_source() == local


def test_a_directory_beats_a_hub_of_the_same_name(
    demo_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    demo_values["model"]["source"] = "owner/name"
    assert config.check(demo_values, "demo").resolve_source() == Path("owner/name")


def test_data_files_training_first(demo_values: dict[str, Any]) -> None:
    demo_values["data"] |= {"train": ["b", "a"], "test": {"seal": "c", "chat": "d", "copy": "e"}}
    assert config.check(demo_values, "demo").data_files() == ("b", "a", "c", "d", "e")


def test_a_weight_of_a_file_that_is_not_trained_on_is_refused() -> None:
    with pytest.raises(Ms4Error, match=r"data\.weights: b\.jsonl is no entry of data\.train"):
        config.check({"data": {"train": ["a.jsonl"], "weights": {"b.jsonl": 2.0}}}, "c.yaml")


def test_the_set_of_what_is_held_out_has_a_name_of_its_own() -> None:
    data = {"train": ["a.jsonl"], "holdout": 0.1}
    wanted = {"min_exact_match": {"holdout": 0.5}}
    config.check({"data": data, "evaluate": wanted}, "c.yaml")
    with pytest.raises(Ms4Error, match=r"no held-out set is called holdout"):
        config.check({"data": {**data, "holdout": 0}, "evaluate": wanted}, "c.yaml")
    with pytest.raises(Ms4Error, match=r"`holdout` is the set that data\.holdout makes"):
        config.check({"data": {**data, "test": {"holdout": "b.jsonl"}}}, "c.yaml")
