"""The questions: that they ask for real fields, offer what runs, and take typed answers."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms4 import memory, spec
from ms4.device import GIB
from ms4.errors import Ms4Error
from ms4_wizard.questions import (
    STEPS,
    Draft,
    Question,
    field_type,
    read_setting,
)

QUESTIONS = {question.field: question for step in STEPS for question in step.questions}
LEAST = {"data": {"train": ["a.jsonl"]}}


def values(annotation: Any) -> set[str]:
    """The values that a field of choices can hold at all."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(values(part) for part in get_args(annotation)))


def accepted(field: str, value: Any) -> bool:
    draft = Draft(LEAST)
    draft.set(field, value)
    return draft.check()[0] is not None


def test_screens_in_their_order() -> None:
    assert [step.key for step in STEPS] == [
        *("data", "modality", "reasoning", "method", "memory", "experts", "adapters", "where")
    ]
    assert sum(len(step.questions) for step in STEPS) == len(QUESTIONS), "asked twice"


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=lambda q: q.field)
def test_question(question: Question) -> None:
    field_type(question.field)  # raises if there is no such field
    assert bool(question.choices) == (question.form in ("choice", "several"))
    # On a screen of 80 columns 42 are left for a question.
    assert len(question.ask) <= 42
    assert len(textwrap.wrap(question.advice, 42)) <= 2, "more than two lines"
    for choice in question.choices:
        assert len(choice.meaning) <= 40


@pytest.mark.parametrize(
    "question", [q for q in QUESTIONS.values() if q.choices], ids=lambda q: q.field
)
def test_what_runs_is_offered_and_nothing_else(question: Question) -> None:
    offered = {choice.value for choice in question.choices}
    possible = values(field_type(question.field)) - {"all"}  # which stands for all the others
    assert offered <= possible
    wrap = (lambda v: [v]) if question.form == "several" else (lambda v: v)
    assert offered == {value for value in possible if accepted(question.field, wrap(value))}


def test_what_does_not_run_is_refused() -> None:
    """Otherwise the test above would compare two complete lists."""
    assert not accepted("method", "full")


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("seed=7", "seed", "7"),
        ("model.source=./a=b", "model.source", "./a=b"),
        ("model.source=123", "model.source", "123"),
        ("model.revision=null", "model.revision", None),
        ("run.memory_gib=", "run.memory_gib", None),
        ("train.learning_rate=6e-5", "train.learning_rate", "6e-5"),
        ("adapters.targets=experts", "adapters.targets", ["experts"]),
        ("adapters.targets=[attention, experts]", "adapters.targets", ["attention", "experts"]),
        ("data.train=my data.jsonl", "data.train", ["my data.jsonl"]),
        ("data.train={a}.jsonl", "data.train", ["{a}.jsonl"]),
        ("data.test={a: b}", "data.test", {"a": "b"}),
        ("data.test.seal=x: y", "data.test.seal", "x: y"),
        ("train.offload_activations=false", "train.offload_activations", "false"),
        ("where.partition=gpu", "where.partition", "gpu"),
    ],
)
def test_setting(setting: str, field: str, value: Any) -> None:
    assert read_setting(setting) == (field, value)
    draft = Draft(LEAST)
    draft.set(field, value)
    answers, faults = draft.check()
    assert answers is not None, faults


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "needs the form key=value"),
        ("sed=1", "unknown key `sed`; did you mean `seed`?"),
        (
            "model.zzz=1",
            "unknown key `zzz`; known: source, revision, layout, free_source, experts,",
        ),
        ("seed.more=1", "`seed` has no keys"),
        ("seed=many", "Input should be a valid integer"),
        ("model.experts=int3", "Input should be 'nf4', 'fp8' or 'bf16'"),
        ("model=tiny", "Input should be"),
    ],
)
def test_bad_setting(setting: str, message: str) -> None:
    with pytest.raises(Ms4Error) as raised:
        read_setting(setting)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.text(min_size=1).filter(lambda text: text != "null"))
def test_any_text_can_be_a_source(text: str) -> None:
    assert read_setting(f"model.source={text}") == ("model.source", text)


def test_typed_answers() -> None:
    draft = Draft({})
    typed = {
        "model.source": "tiny",
        "data.train": "a.jsonl\n\n  b c.jsonl",
        "data.test": "x = d.jsonl\ny=e=f.jsonl",
        "data.sequence_length": "128",
        "run.memory_gib": "1.5",
        "adapters.rank": "8",
    }
    for field, text in typed.items():
        draft.answer(QUESTIONS[field], text)
    answers, faults = draft.check()
    assert answers is not None, faults
    assert answers.model.source == "tiny"
    assert answers.data.train == ("a.jsonl", "  b c.jsonl")
    assert answers.data.test == {"x": "d.jsonl", "y": "e=f.jsonl"}
    assert (answers.data.sequence_length, answers.adapters.rank) == (128, 8)
    assert answers.run.memory_gib == 1.5
    draft.answer(QUESTIONS["run.memory_gib"], "")
    again, _ = draft.check()
    assert again is not None
    assert again.run.memory_gib is None


@pytest.mark.parametrize(
    ("values", "typed"),
    [
        ({"train": ["a", " b ", "=", "é"]}, True),
        ({"train": ["new\nline"]}, False),
        ({"train": ["a\x1b]0;x"]}, False),
        ({"train": ["a\x85b"]}, False),
        ({"train": ["a\u2028b"]}, False),
        ({"train": [" "]}, False),
        ({}, True),
    ],
)
def test_what_survives_being_typed(values: dict[str, Any], typed: bool) -> None:
    """A path with a line break cannot be typed, but an answers file can give it."""
    draft = Draft({"data": values})
    question = QUESTIONS["data.train"]
    assert draft.can_be_typed(question) == typed
    if typed and values:
        draft.answer(question, draft.text(question))
        assert draft.get("data.train") == values["train"]


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("data.train", "", "at least 1 item"),
        ("data.test", "no name", "`no name`: write name = path"),
        ("data.test", "a b = c", "should match pattern"),
        ("data.test", "a = b\na = c", "`a` is given twice"),
        ("data.sequence_length", "few", "valid integer"),
        ("data.sequence_length", "", "valid integer"),
        ("run.memory_gib", "-1", "greater than 0"),
        ("adapters.rank", "0", "greater than or equal to 1"),
        ("where.partition", "$(reboot)", "should match pattern"),
        ("where.hours", "0", "greater than or equal to 1"),
    ],
)
def test_fault_is_at_its_question(field: str, text: str, message: str) -> None:
    draft = Draft({**LEAST, "where": {"run": "slurm"}})
    draft.answer(QUESTIONS[field], text)
    answers, faults = draft.check()
    assert answers is None
    assert set(faults) == {field}
    assert message in faults[field]


def test_sizes_that_the_choices_name() -> None:
    """They are text; the planner computes the same."""
    full = spec.Dimensions()
    share = spec.parameters_by_role(full)["experts"] / spec.PUBLISHED_PARAMETERS
    sizes = {kind: memory.expert_bytes(full, kind) / GIB for kind in ("nf4", "bf16")}
    question = QUESTIONS["model.experts"]
    assert f"{share:.0%}".replace("%", " %") in question.advice
    meanings = {choice.value: choice.meaning for choice in question.choices}
    assert f"{sizes['nf4']:.1f} GiB" in meanings["nf4"]
    assert f"{sizes['bf16']:.0f} GiB" in meanings["bf16"]


def test_missing_and_unknown() -> None:
    assert Draft({}).check() == (None, {"data.train": "is needed"})
    answers, faults = Draft({**LEAST, "sed": 1}).check()
    assert answers is None
    assert faults == {"": "sed: Extra inputs are not permitted"}
    answers, faults = Draft({**LEAST, "method": "full"}).check()
    assert "does not run in this version" in faults[""]


def test_slurm_is_asked_only_for_slurm() -> None:
    draft = Draft(LEAST)
    slurm = [q for q in QUESTIONS.values() if q.only_if]
    assert len(slurm) == 3
    assert not any(draft.asks(question) for question in slurm)
    draft.set("where.run", "slurm")
    assert all(draft.asks(question) for question in slurm)
