"""The configuration: what is accepted, every message for what is not, and what reruns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from ms4 import config
from ms4.errors import Ms4Error
from tests.commands import CHECKOUT

MINIMAL = "data: {train: [a.jsonl]}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("c.yaml")


def load(file: Path, text: str) -> config.RunConfig:
    file.write_text(text, encoding="utf-8")
    return config.load(file)


def refusal(file: Path, text: str) -> str:
    with pytest.raises(Ms4Error) as caught:
        load(file, text)
    return str(caught.value)


# What is accepted.


def test_minimal(file: Path) -> None:
    loaded = load(file, MINIMAL)
    assert loaded.data.train == ("a.jsonl",)
    assert loaded.model.source == "mistralai/Mistral-Small-4-119B-2603"
    assert loaded == config.RunConfig(data=config.DataSection(train=("a.jsonl",)))


@pytest.mark.parametrize(
    ("text", "value"), [("6e-5", 6e-5), ("4E-3", 4e-3), ("1.0e-4", 1e-4), ("0.5", 0.5), ("1", 1.0)]
)
def test_numbers_that_pyyaml_reads_as_text(file: Path, text: str, value: float) -> None:
    loaded = load(file, MINIMAL + f"train: {{learning_rate: {text}}}\n")
    assert loaded.train.learning_rate == value
    assert isinstance(loaded.train.learning_rate, float)


def test_json_is_read_too(file: Path) -> None:
    assert load(file, '{"data": {"train": ["a.jsonl"]}, "seed": 3}').seed == 3


def test_every_error_at_once(file: Path) -> None:
    text = "sed: 1\ndata:\n  train: []\nmodel:\n  experts: int8\n"
    assert len(refusal(file, text).splitlines()) == 3


def test_values_are_immutable(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(file, MINIMAL).seed = 4


# What is not.


REFUSED = [
    # unknown keys: a suggestion, or what is known
    ("sed: 1\n" + MINIMAL, "c.yaml:1: sed: unknown key; did you mean `seed`?"),
    (
        MINIMAL + "zzzzz: 1\n",
        "c.yaml:2: zzzzz: unknown key; known: method, seed, model, data, adapters, train, "
        "evaluate, run",
    ),
    (
        MINIMAL + "train:\n  steps: 5\n  learning_rat: 0.1\n",
        "c.yaml:4: train.learning_rat: unknown key; did you mean `learning_rate`?",
    ),
    (
        MINIMAL + "adapters: {bias: none}\n",
        "c.yaml:2: adapters.bias: unknown key; known: targets, rank, expert_rank, alpha, rslora, "
        "dropout, dtype",
    ),
    # missing
    ("seed: 1\n", "c.yaml: data: is missing; add it"),
    ("data: {}\n", "c.yaml:1: data.train: is missing; add it"),
    # wrong types
    (
        MINIMAL + "seed: many\n",
        "c.yaml:2: seed: Input should be a valid integer, unable to parse string as an integer "
        "(it is 'many')",
    ),
    (
        "data: {train: a.jsonl}\n",
        "c.yaml:1: data.train: Input should be a valid tuple (it is 'a.jsonl')",
    ),
    (
        "data:\n  train:\n    - a.jsonl\n    - 7\n",
        "c.yaml:4: data.train.1: Input should be a valid string (it is 7)",
    ),
    (
        MINIMAL + "model: tiny\n",
        "c.yaml:2: model: Input should be a valid dictionary or instance of ModelSection "
        "(it is 'tiny')",
    ),
    (
        MINIMAL + "train: {steps: 1.5}\n",
        "c.yaml:2: train.steps: Input should be a valid integer, got a number with a fractional "
        "part (it is 1.5)",
    ),
    # choices
    (
        MINIMAL + "model: {experts: int8}\n",
        "c.yaml:2: model.experts: Input should be 'nf4', 'fp8' or 'bf16' (it is 'int8')",
    ),
    (
        MINIMAL + "evaluate: {efforts: [none, low]}\n",
        "c.yaml:2: evaluate.efforts.1: Input should be 'none' or 'high' (it is 'low')",
    ),
    (
        MINIMAL + "adapters: {targets: [router]}\n",
        "c.yaml:2: adapters.targets.0: Input should be 'attention', 'shared', 'experts' or 'all' "
        "(it is 'router')",
    ),
    # out of range
    (
        MINIMAL + "seed: -1\n",
        "c.yaml:2: seed: Input should be greater than or equal to 0 (it is -1)",
    ),
    (MINIMAL + "seed: 4294967296\n", "c.yaml:2: seed: Input should be less than 4294967296"),
    (
        MINIMAL + "train: {learning_rate: 0}\n",
        "c.yaml:2: train.learning_rate: Input should be greater than 0 (it is 0)",
    ),
    (
        MINIMAL + "train: {learning_rate: .nan}\n",
        "c.yaml:2: train.learning_rate: Input should be a finite number (it is nan)",
    ),
    (
        MINIMAL + "train: {max_grad_norm: .inf}\n",
        "c.yaml:2: train.max_grad_norm: Input should be a finite number (it is inf)",
    ),
    (
        "data: {train: [b], test: {a: a}}\nevaluate: {min_exact_match: {a: .nan}}\n",
        "c.yaml:2: evaluate.min_exact_match.a: Input should be a finite number (it is nan)",
    ),
    (
        MINIMAL + "adapters: {targets: []}\n",
        "c.yaml:2: adapters.targets: Tuple should have at least 1",
    ),
    ("data: {train: []}\n", "c.yaml:1: data.train: Tuple should have at least 1 item"),
    ("data: {train: [a], test: {'a b': c}}\n", "c.yaml:1: data.test.a b"),
    (
        MINIMAL + f"model: {{source: {'x' * 100}, revision: '{'?' * 100}'}}\n",
        f"c.yaml:2: model.revision: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._/-]*$' "
        f"(it is '{'?' * 27}...{'?' * 28}')",
    ),
    # across fields
    (MINIMAL + "method: full\n", "c.yaml: method: `full` does not run in this version; use `lora`"),
    (
        MINIMAL + "model: {source: tiny, revision: main}\n",
        "c.yaml: model.revision: the tiny model has none; remove it",
    ),
    (
        MINIMAL + "model: {source: tiny, layout: native}\n",
        "c.yaml: model.layout: the tiny model is made in `hf`; remove it",
    ),
    (
        MINIMAL + "model: {source: tiny, free_source: true}\n",
        "c.yaml: model.free_source: the tiny model is not fetched; remove it",
    ),
    (
        MINIMAL + "adapters: {targets: [shared, attention, shared]}\n",
        "c.yaml: adapters.targets: names a target twice",
    ),
    (
        MINIMAL + "adapters: {targets: [all, shared]}\n",
        "c.yaml: adapters.targets: names a target twice",
    ),
    (
        MINIMAL + "adapters: {expert_rank: 4}\n",
        "c.yaml: adapters.expert_rank: adapters.targets names no routed experts; remove it",
    ),
    (
        MINIMAL + "adapters: {targets: [experts], dropout: 0.1}\n",
        "c.yaml: adapters.dropout: only dense layers have it, and adapters.targets names none. "
        "Experts' adapters are saved as `target_parameters`, for which PEFT refuses it: "
        "they change the weight, whose inputs they do not see; set it to 0",
    ),
    (
        MINIMAL + "train: {checkpointing: none, offload_activations: true}\n",
        "c.yaml: train.offload_activations: without checkpointing no layer's input stands for "
        "what is recomputed; set train.checkpointing to full or selective",
    ),
    (
        MINIMAL + "train: {optimizer: paged_adamw_8bit}\nrun: {device: cpu}\n",
        "c.yaml: train.optimizer: `paged_adamw_8bit` pages GPU memory, and the device is a CPU; "
        "use adamw_8bit",
    ),
    (
        MINIMAL + "train: {offload_activations: true}\nrun: {device: cpu}\n",
        "c.yaml: train.offload_activations: on a CPU, the device's memory is the host's; set it "
        "to false",
    ),
    (
        MINIMAL + "evaluate: {min_exact_match: {seal: 0.5}}\n",
        "c.yaml: evaluate.min_exact_match: no held-out set is called seal; data.test has none",
    ),
    (
        "data: {train: [a], test: {b: b, c: c}}\nevaluate: {min_exact_match: {seal: 0.5}}\n",
        "c.yaml: evaluate.min_exact_match: no held-out set is called seal; data.test has b, c",
    ),
    (
        "data: {train: [a], test: {b: b}}\nevaluate: {min_exact_match: {b: 1.5}}\n",
        "c.yaml: evaluate.min_exact_match.b: 1.5 is not between 0 and 1",
    ),
    # not a configuration
    (
        MINIMAL + "seed: 1\nseed: 2\n",
        "c.yaml: not valid YAML: line 3: the key 'seed' is given twice",
    ),
    (
        "data:\n  train: [a]\n  train: [b]\n",
        "c.yaml: not valid YAML: line 3: the key 'train' is given twice",
    ),
    ("1: 2\n", "c.yaml: not valid YAML: line 1: the key 1 is not text"),
    ("? [a, b]\n: 2\n", "c.yaml: not valid YAML: line 1: the key ['a', 'b'] is not text"),
    ("data: [a\n", "c.yaml: not valid YAML: line 2: "),
    ("a: !!python/object:os.system {}\n", "c.yaml: not valid YAML: line 1: could not determine a"),
    ("a: \x07\n", "c.yaml: not valid YAML: "),
    ("", "c.yaml: holds no configuration; it must be a mapping of keys to values."),
    ("# nothing\n", "c.yaml: holds no configuration; it must be a mapping of keys to values."),
    ("- a\n- b\n", "c.yaml: holds no configuration; it must be a mapping of keys to values."),
    ("just text\n", "c.yaml: holds no configuration; it must be a mapping of keys to values."),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(file: Path, text: str, message: str) -> None:
    assert refusal(file, text).startswith(message)
    assert len(refusal(file, text).splitlines()) == 1


def test_missing_file(file: Path) -> None:
    with pytest.raises(Ms4Error, match=r"^c\.yaml: no such configuration file\.$"):
        config.load(file)


def test_directory(file: Path) -> None:
    file.mkdir()
    with pytest.raises(Ms4Error, match=r"^c\.yaml: cannot be read \(.*Is a directory"):
        config.load(file)


def test_binary_file(file: Path) -> None:
    file.write_bytes(b"\x93NUMPY\x01\x00\xff\xfe")
    with pytest.raises(Ms4Error, match=r"^c\.yaml: cannot be read \(.*can't decode byte"):
        config.load(file)


def test_values_without_a_file() -> None:
    with pytest.raises(Ms4Error, match=r"^answers: sed: unknown key; did you mean `seed`\?$"):
        config.check({"sed": 1, "data": {"train": ["a"]}}, "answers")


# Dump and load.


def shares() -> st.SearchStrategy[float]:
    return st.floats(0, 1)


@st.composite
def configurations(draw: st.DrawFn) -> config.RunConfig:
    names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True)
    # YAML cannot hold a lone surrogate, and a file system path no NUL.
    paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
    test = draw(st.dictionaries(names, paths, max_size=3))
    positive = st.floats(0, 1, exclude_min=True)
    values = {
        "seed": draw(st.integers(0, 2**32 - 1)),
        "model": {
            "source": draw(paths.filter(lambda text: text != "tiny")),
            "revision": draw(st.none() | names),
            "experts": draw(st.sampled_from(["nf4", "bf16"])),
            "softmax_scale": draw(st.sampled_from(["plain", "yarn"])),
        },
        "data": {
            "train": draw(st.lists(paths, min_size=1, max_size=3)),
            "test": test,
            "reasoning": draw(st.sampled_from(["none", "high", "per_sample"])),
            "sequence_length": draw(st.integers(16, 1_048_576)),
            "too_long": draw(st.sampled_from(["error", "drop"])),
        },
        "adapters": {
            "targets": draw(
                st.lists(
                    st.sampled_from(["attention", "shared", "experts"]), min_size=1, unique=True
                )
                | st.just(["all"])
            ),
            "rank": draw(st.integers(1, 512)),
            "alpha": draw(st.floats(0, 4096, exclude_min=True)),
            "rslora": draw(st.booleans()),
            "dtype": draw(st.sampled_from(["fp32", "bf16"])),
        },
        "train": {
            "steps": draw(st.none() | st.integers(1)),
            "epochs": draw(st.floats(0, 1000, exclude_min=True)),
            "learning_rate": draw(positive),
            "warmup": draw(st.floats(0, 1, exclude_max=True)),
            "weight_decay": draw(shares()),
            "checkpointing": draw(st.sampled_from(["full", "selective", "none", "auto"])),
            "optimizer": draw(st.sampled_from(["adamw", "adamw_8bit"])),
        },
        "evaluate": {
            "efforts": draw(st.sampled_from([["none"], ["high"], ["none", "high"]])),
            "min_exact_match": {name: draw(shares()) for name in test},
        },
        "run": {
            "device": draw(st.sampled_from(["auto", "cpu", "cuda"])),
            "threads": draw(st.none() | st.integers(1, 1024)),
            "memory_gib": draw(st.none() | positive),
        },
    }
    return config.check(values, "drawn")


@settings(deadline=None)
@given(drawn=configurations())
def test_dump_and_load(tmp_path_factory: pytest.TempPathFactory, drawn: config.RunConfig) -> None:
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    text = config.dump(drawn)
    path.write_text(text, encoding="utf-8", newline="")
    loaded = config.load(path)
    assert loaded == drawn
    assert config.dump(loaded) == text
    assert all(loaded.part_hash(stage) == drawn.part_hash(stage) for stage in config.STAGES)
    jsonschema.validate(drawn.model_dump(mode="json"), json.loads(config.json_schema()))


# Descriptions and schema.


def sections(model: type[BaseModel] = config.RunConfig) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_every_field_is_described() -> None:
    fields = [
        (f"{model.__name__}.{name}", field.description)
        for model in sections()
        for name, field in model.model_fields.items()
    ]
    assert [name for name, text in fields if not text or len(text) < 10] == []
    # A person can survey so many; sections are not fields.
    assert len(fields) - (len(list(sections())) - 1) <= 58


def test_schema_accepts_the_demo_and_refuses_what_load_refuses(demo_values: dict[str, Any]) -> None:
    schema = json.loads((CHECKOUT / "config/schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(demo_values, schema)
    for path, value in (("seed", -1), ("sed", 1), ("model", {"experts": "int8"}), ("data", {})):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(demo_values | {path: value}, schema)


def test_demo_is_the_tiny_model(demo_values: dict[str, Any]) -> None:
    assert demo_values["model"]["source"] == "tiny"
    assert config.load(CHECKOUT / "config/config.yaml").resolve_source() is None


# What a section works out.


def test_presets_ranks_and_scaling() -> None:
    every = config.AdaptersSection(targets=("all",), rank=8, expert_rank=2, alpha=16.0)
    assert every.presets == config.PRESETS == ("attention", "shared", "experts")
    assert [every.rank_of(preset) for preset in config.PRESETS] == [8, 8, 2]
    assert [every.scaling(preset) for preset in config.PRESETS] == [2.0, 2.0, 8.0]
    stable = every.model_copy(update={"rslora": True, "rank": 64, "expert_rank": 4})
    assert [stable.scaling(preset) for preset in config.PRESETS] == [2.0, 2.0, 8.0]
    dense = config.AdaptersSection(targets=("shared", "attention"))
    assert dense.presets == ("attention", "shared")
