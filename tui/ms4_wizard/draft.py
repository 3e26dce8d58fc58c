"""Answers on their way: plain values of any kind, and what is wrong with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ms4 import settings
from ms4.errors import printable
from ms4_wizard.answers import Answers, may_be_empty
from ms4_wizard.questions import LINES, NAMED, Question
from ms4_wizard.steps import STEPS


class Draft:
    """Answers on their way: plain values of any kind, and what is wrong with them, by field."""

    def __init__(
        self,
        values: Mapping[str, Any],
        typed: Mapping[str, str] | None = None,
        computed: set[str] | None = None,
    ) -> None:
        """
        Args:
            values: the tree of what is given.
            typed: field → text that no value can stand for.
            computed: fields whose value was not given by a person but follows from the others.
        """
        self.values: dict[str, Any] = copy.deepcopy(dict(values))
        # A section that is needed is there, so that what is missing is the field in it.
        self.values.setdefault("data", {})
        self.typed: dict[str, str] = dict(typed or {})
        self.computed: set[str] = set(computed or ())

    @classmethod
    def of(cls, answers: Answers) -> Draft:
        """A draft that says what `answers` says."""
        return cls(answers.model_dump(mode="json"))

    def copy(self) -> Draft:
        """Another draft of the same answers."""
        return Draft(self.values, self.typed, self.computed)

    def get(self, field: str) -> Any:
        """The value of a dotted field; its default if it is not given; None without one."""
        value: Any = self.values
        model: Any = Answers
        for name in field.split("."):
            info = model.model_fields[name]
            if isinstance(value, Mapping) and name in value:
                value = value[name]
            else:
                value = None if info.is_required() else info.get_default(call_default_factory=True)
                value = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            model = info.annotation
        return value

    def given(self, field: str) -> bool:
        """Whether a person (or a file of theirs) gave the field, and not a default or a sum."""
        value: Any = self.values
        for name in field.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return False
            value = value[name]
        return field not in self.computed

    def set(self, field: str, value: Any) -> None:
        """Give a dotted field a value."""
        self.computed.discard(field)
        self.typed.pop(field, None)
        settings.put(self.values, field, value)

    def compute(self, field: str, value: Any) -> None:
        """Give a field that nobody gave a value that follows from the other answers."""
        self.set(field, value)
        self.computed.add(field)

    def asks(self, question: Question) -> bool:
        """Whether the question is asked, given the other answers."""
        if question.only_if is None:
            return True
        value = self.get(question.only_if[0])
        wanted = question.only_if[1]
        return wanted in value if isinstance(value, list | tuple) else value == wanted

    def text(self, question: Question) -> str:
        """The answer as it is typed."""
        if question.field in self.typed:
            return self.typed[question.field]
        value = self.get(question.field)
        if value is None:
            return ""
        if question.form == "lines":
            return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if question.form in NAMED:
            return "\n".join(f"{name} = {what}" for name, what in value.items())
        if question.form == "several":
            return ", ".join(value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(value)

    def answer(self, question: Question, text: str) -> None:
        """Take a typed answer."""
        value: Any = text
        wrong = False
        if question.form == "lines":
            value = _lines(text)
        elif question.form in NAMED:
            value, fault = _named(text)
            wrong = fault is not None
        elif not text and may_be_empty(question.field):
            value = None
        if question.field == "model.source" and self.get("model.revision") is not None:
            self.set("model.revision", None)  # it was a revision of another model
        self.set(question.field, value)
        if wrong:
            self.typed[question.field] = text
        if question.field == "data.test":
            self._forget_thresholds(value)

    def can_be_typed(self, question: Question) -> bool:
        """Whether the answer survives being shown and typed. A path with a line break or another
        control character in it, from an answers file, does not."""
        text = self.text(question)
        if not text or question.field in self.typed:
            return True
        other = Draft({})
        other.answer(question, text)
        value = self.get(question.field)
        if question.form == "named_numbers":
            value = {name: str(number) for name, number in value.items()}
        same = other.get(question.field) == value
        lines = question.form in LINES
        return printable(text) == text and (same if lines else "\n" not in text)

    def _forget_thresholds(self, sets: Mapping[str, str]) -> None:
        """A set that is no longer held out has no share of exact answers to reach."""
        field = "evaluate.min_exact_match"
        if field not in self.typed and (thresholds := self.get(field)):
            self.set(field, {name: x for name, x in thresholds.items() if name in sets})

    def check(self) -> tuple[Answers | None, dict[str, str]]:
        """The answers, if all are good; else what is wrong, by question's field.

        A fault that belongs to no field is under the empty name."""
        faults = {field: _named(text)[1] or "cannot be read" for field, text in self.typed.items()}
        try:
            answers = Answers.model_validate(self._asked())
            return (None, faults) if faults else (answers, {})
        except ValidationError as error:
            fields = [question.field for step in STEPS for question in step.questions]
            for fault in error.errors():
                location = ".".join(str(part) for part in fault["loc"])
                message = _words(fault["type"], fault.get("ctx", {}))
                message = message or fault["msg"].removeprefix("Value error, ")
                for line in message.splitlines() or [""]:
                    # A check across fields begins with the name of the one to change.
                    place, colon, rest = line.partition(": ")
                    begins = any(f"{place}.".startswith(f"{name}.") for name in fields)
                    where, told = (
                        (place, rest)
                        if not location and colon and begins
                        else (
                            location,
                            line,
                        )
                    )
                    near = [name for name in fields if f"{where}.".startswith(f"{name}.")]
                    if not near and where:
                        told = f"{where}: {told}"
                    faults.setdefault(near[0] if near else "", told)
            return None, faults

    def _asked(self) -> dict[str, Any]:
        """The values without a rank of experts that get no adapters: it waits for them."""
        values = self.values
        adapters = values.get("adapters")
        targets = self.get("adapters.targets")
        if isinstance(adapters, Mapping) and "expert_rank" in adapters:
            held = isinstance(targets, list | tuple) and {"experts", "all"} & set(map(str, targets))
            if not held:
                rest = {name: x for name, x in adapters.items() if name != "expert_rank"}
                values = {**values, "adapters": rest}
        return values


_WORDS = {
    "missing": "is needed",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "int_parsing_size": "write a smaller number",
    "float_parsing": "write a number",
    "float_type": "write a number",
    "finite_number": "write a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "too_short": "name at least one",
}
"""What is wrong, by the kind of fault, in the words of a person who asks."""


def _words(kind: str, limits: Mapping[str, Any]) -> str:
    told = {name: f"{x:g}" if isinstance(x, float) else x for name, x in limits.items()}
    return _WORDS.get(kind, "").format_map(told)


def _named(text: str) -> tuple[dict[str, str], str | None]:
    """The names and values of `name = value` lines, and what is wrong with them."""
    found: dict[str, str] = {}
    fault = None
    for line in _lines(text):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            fault = f"`{line.strip()}`: write name = …"
        elif name in found:
            fault = f"`{name}` is given twice"
        else:
            found[name] = value
    return found, fault


def _lines(text: str) -> list[str]:
    """The lines with something in them; only a line feed ends a line, as in the control."""
    return [line for line in text.split("\n") if line.strip()]
