"""The questions: that they ask for real fields, offer what runs, and take typed answers."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms4 import spec
from ms4.errors import Ms4Error
from ms4_wizard.answers import field_type, read_setting
from ms4_wizard.draft import Draft
from ms4_wizard.pages import PAGES, page
from ms4_wizard.questions import LINES, Question
from ms4_wizard.steps import QUESTIONS, STEPS

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
        *("machine", "data", "modality", "reasoning", "method", "memory", "adapters"),
        *("training", "where", "evaluation"),
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
    if question.form == "number":
        assert len(question.ask) <= 22, "it stands beside its answer"
    assert question.field in PAGES, "nothing more to say than two lines?"
    assert len(" ".join(text for _, text in page(question))) > 2 * len(question.advice)


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
        ("data.train", "", "name at least one"),
        ("data.test", "no name", "`no name`: write name = …"),
        ("data.test", "a b = c", "should match pattern"),
        ("data.test", "a = b\na = c", "`a` is given twice"),
        ("data.sequence_length", "few", "whole number"),
        ("data.sequence_length", "", "whole number"),
        ("run.memory_gib", "-1", "must be more than 0"),
        ("adapters.rank", "0", "must be 1 or more"),
        ("where.partition", "$(reboot)", "should match pattern"),
        ("where.hours", "0", "must be 1 or more"),
    ],
)
def test_fault_is_at_its_question(field: str, text: str, message: str) -> None:
    draft = Draft({**LEAST, "where": {"run": "slurm"}})
    draft.answer(QUESTIONS[field], text)
    answers, faults = draft.check()
    assert answers is None
    assert set(faults) == {field}
    assert message in faults[field]


def test_share_that_the_advice_names() -> None:
    """It is text; the planner computes the same."""
    full = spec.Dimensions()
    share = spec.parameters_by_role(full)["experts"] / spec.PUBLISHED_PARAMETERS
    question = QUESTIONS["model.experts"]
    assert f"{share:.0%}".replace("%", " %") in question.advice


def test_missing_and_unknown() -> None:
    assert Draft({}).check() == (None, {"data.train": "is needed"})
    answers, faults = Draft({**LEAST, "sed": 1}).check()
    assert answers is None
    assert faults == {"": "sed: Extra inputs are not permitted"}
    answers, faults = Draft({**LEAST, "method": "full"}).check()
    assert "does not run in this version" in faults["method"]


def test_slurm_is_asked_only_for_slurm() -> None:
    draft = Draft(LEAST)
    slurm = [q for q in QUESTIONS.values() if q.field.startswith("where.") and q.only_if]
    assert len(slurm) == 4
    assert not any(draft.asks(question) for question in slurm)
    draft.set("where.run", "slurm")
    assert all(draft.asks(question) for question in slurm)


def test_a_rank_of_experts_waits_for_experts() -> None:
    """It is asked only for them, and what was answered is not lost when they are taken away."""
    question = QUESTIONS["adapters.expert_rank"]
    draft = Draft(LEAST)
    assert not draft.asks(question)
    draft.set("adapters.targets", ["shared", "experts"])
    assert draft.asks(question)
    draft.answer(question, "4")
    draft.set("adapters.targets", ["shared"])
    answers, faults = draft.check()
    assert answers is not None, faults
    assert answers.adapters.expert_rank is None
    draft.set("adapters.targets", ["experts"])
    again, _ = draft.check()
    assert again is not None
    assert again.adapters.expert_rank == 4


def test_lines_that_cannot_be_read_stay_as_they_were_typed() -> None:
    draft = Draft(LEAST)
    question = QUESTIONS["data.test"]
    draft.answer(question, "a = b\nhalf a li")
    assert draft.text(question) == "a = b\nhalf a li"
    assert set(draft.check()[1]) == {"data.test"}
    assert set(draft.copy().check()[1]) == {"data.test"}
    draft.answer(question, "a = b")
    assert draft.check()[0] is not None
    assert {question.form for question in QUESTIONS.values()} >= set(LINES)


def test_what_is_computed_is_not_given() -> None:
    draft = Draft({**LEAST, "train": {"epochs": 2}})
    assert draft.given("train.epochs")
    assert not draft.given("train.accumulation")
    draft.compute("train.accumulation", 4)
    assert draft.get("train.accumulation") == 4
    assert not draft.given("train.accumulation")
    draft.answer(QUESTIONS["train.accumulation"], "4")
    assert draft.given("train.accumulation")
