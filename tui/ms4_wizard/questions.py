"""What the wizard asks: one typed tuple, from which the screens are made, over one typed tree of
answers, which is also what `--answers FILE` may hold.

Answers are a configuration and, beside it, where the pipeline runs. The questions ask for the part
of it that a person should decide; the rest keeps its default, and any of it can be set in an
answers file or by `--set`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError

from ms4 import config, settings
from ms4.errors import printable

SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}$")]
"""Of a partition or an account. Snakemake evaluates what stands in a profile as Python: quoted,
and of these characters, it is only ever a name."""


class Where(config.Section):
    """Where the pipeline runs; this goes to the project's profiles, not to its configuration."""

    run: Literal["local", "slurm"] = "local"
    """`local`: all stages on this machine; `slurm`: each stage is a job."""

    partition: SlurmName | None = None
    """Slurm partition of the jobs; null: the cluster's default."""

    account: SlurmName | None = None
    """Slurm account that the jobs are charged to; null: your default."""

    hours: int | None = Field(default=None, ge=1, le=8760)
    """Time limit of the training job in hours (null: 24). A job that meets it is submitted again
    and goes on from its last checkpoint."""


class Answers(config.RunConfig):
    """All answers. Relative paths are relative to the directory that the wizard is started in."""

    where: Where = Where()
    """Where the pipeline runs."""

    def configuration(self) -> config.RunConfig:
        """The part that is the project's configuration."""
        return config.RunConfig.model_validate(self.model_dump(exclude={"where"}))


@dataclass(frozen=True)
class Choice:
    """One of the answers to choose from."""

    value: str
    meaning: str
    """What choosing it does, in a line."""


Form = Literal["text", "lines", "named_lines", "choice", "several"]
"""How an answer is given: a line of text; a list, one a line; `name = value` lines; one of the
choices; any of the choices."""


@dataclass(frozen=True)
class Question:
    """A question for one field of the answers."""

    field: str
    """Dotted name, as in an answers file."""
    form: Form
    ask: str
    advice: str
    """What it is, and what most people choose: two lines of a narrow screen at most."""
    choices: tuple[Choice, ...] = ()
    only_if: tuple[str, str] | None = None
    """Asked only if that field has that value."""


@dataclass(frozen=True)
class Step:
    """Questions that stand on one screen."""

    key: str
    title: str
    questions: tuple[Question, ...]


STEPS: tuple[Step, ...] = (
    Step(
        "data",
        "Model and data",
        (
            Question(
                "model.source",
                "text",
                "Weights",
                "Hub id or a local directory. `tiny` is a toy model that trains in minutes.",
            ),
            Question(
                "data.train",
                "lines",
                "Training data",
                "JSONL files of chat messages, one path a line.",
            ),
            Question(
                "data.test",
                "named_lines",
                "Held-out data",
                "`name = path`, one a line. Never trained on; untuned and tuned are compared.",
            ),
        ),
    ),
    Step(
        "modality",
        "Modality",
        (
            Question(
                "data.modality",
                "choice",
                "What do the conversations hold?",
                "The vision tower stays as it is.",
                (Choice("text", "text only"), Choice("text_vision", "text and images")),
            ),
        ),
    ),
    Step(
        "reasoning",
        "Reasoning mode",
        (
            Question(
                "data.reasoning",
                "choice",
                "Reasoning effort of the training data",
                "The model is told its effort before each conversation. Most data is mixed.",
                (
                    Choice("per_sample", "each sample its own effort"),
                    Choice("high", "all samples think before they answer"),
                    Choice("none", "no sample thinks"),
                ),
            ),
        ),
    ),
    Step(
        "method",
        "Method",
        (
            Question(
                "method",
                "choice",
                "What is trained?",
                "Adapters learn most tasks and take a fraction of the memory.",
                (Choice("lora", "LoRA adapters over the frozen model"),),
            ),
        ),
    ),
    Step(
        "memory",
        "Memory budget",
        (
            Question(
                "run.device",
                "choice",
                "Which device trains?",
                "The plan beside this counts that device's memory.",
                (
                    Choice("auto", "a GPU if there is one, else the CPU"),
                    Choice("cuda", "a GPU, here or where it will train"),
                    Choice("cpu", "the CPU"),
                ),
            ),
            Question(
                "run.memory_gib",
                "text",
                "Memory budget in GiB",
                "Empty: what the device has. Give it when another machine trains.",
            ),
            Question(
                "data.sequence_length",
                "text",
                "Sequence length in tokens",
                "Samples are packed into it; none may be longer. 2048 suits most chats.",
            ),
            Question(
                "train.micro_batch",
                "text",
                "Sequences in one forward pass",
                "1 takes the least memory; more is faster while the plan has room.",
            ),
        ),
    ),
    Step(
        "experts",
        "Expert quantization",
        (
            Question(
                "model.experts",
                "choice",
                "How are the routed experts held?",
                "97 % of the 119 B model's weights. Most people choose nf4.",
                (
                    Choice("nf4", "4 bits (119 B: 55.7 GiB)"),
                    Choice("fp8", "8 bits, as published (119 B: 108 GiB)"),
                    Choice("bf16", "16 bits, same as fp8 (119 B: 216 GiB)"),
                ),
            ),
        ),
    ),
    Step(
        "adapters",
        "Adapters",
        (
            Question(
                "adapters.targets",
                "several",
                "What gets adapters?",
                "Attention and shared experts suit most tasks; all experts hold more.",
                (
                    Choice("attention", "the five projections of attention"),
                    Choice("shared", "the shared experts"),
                    Choice("experts", "all routed experts (the most memory)"),
                ),
            ),
            Question(
                "adapters.rank",
                "text",
                "Rank",
                "Size of each adapter. 16 to 64 is usual.",
            ),
            Question(
                "adapters.alpha",
                "text",
                "Alpha",
                "Adapters are scaled by alpha / rank. Twice the rank is usual.",
            ),
        ),
    ),
    Step(
        "where",
        "Where to run",
        (
            Question(
                "where.run",
                "choice",
                "Where does the pipeline run?",
                "The project can do both; this is what its README and its plan are about.",
                (
                    Choice("local", "on this machine"),
                    Choice("slurm", "on a Slurm cluster, each stage a job"),
                ),
            ),
            Question(
                "where.partition",
                "text",
                "Slurm partition",
                "Empty: the cluster's default.",
                only_if=("where.run", "slurm"),
            ),
            Question(
                "where.account",
                "text",
                "Slurm account",
                "Empty: your default.",
                only_if=("where.run", "slurm"),
            ),
            Question(
                "where.hours",
                "text",
                "Hours that the training job may take",
                "Empty: 24. A job that meets its limit is submitted again and goes on.",
                only_if=("where.run", "slurm"),
            ),
        ),
    ),
)


def schema() -> str:
    """The JSON schema of an answers file."""
    return config.json_schema(Answers, "ms4-wizard answers")


def field_type(field: str) -> Any:
    """The type of a dotted field of the answers, with its limits.

    Raises:
        Ms4Error: there is no such field.
    """
    return settings.field_type(field, Answers)


def read_setting(setting: str) -> tuple[str, Any]:
    """The answer and the value of `key=value`.

    Raises:
        Ms4Error: there is no such field, or it cannot hold that.
    """
    return settings.read_setting(setting, Answers)


class Draft:
    """Answers on their way: plain values of any kind, and what is wrong with them, by field."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = copy.deepcopy(dict(values))
        # A section that is needed is there, so that what is missing is the field in it.
        self.values.setdefault("data", {})
        self._typed_wrong: dict[str, str] = {}
        """Field → what is wrong with its text, where no value can stand for that."""

    @classmethod
    def of(cls, answers: Answers) -> Draft:
        """A draft that says what `answers` says."""
        return cls(answers.model_dump(mode="json"))

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

    def set(self, field: str, value: Any) -> None:
        """Give a dotted field a value."""
        settings.put(self.values, field, value)

    def asks(self, question: Question) -> bool:
        """Whether the question is asked, given the other answers."""
        return question.only_if is None or self.get(question.only_if[0]) == question.only_if[1]

    def text(self, question: Question) -> str:
        """The answer as it is typed."""
        value = self.get(question.field)
        if value is None:
            return ""
        if question.form == "lines":
            return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if question.form == "named_lines":
            return "\n".join(f"{name} = {path}" for name, path in value.items())
        if question.form == "several":
            return ", ".join(value)
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        return str(value)

    def answer(self, question: Question, text: str) -> None:
        """Take a typed answer."""
        self._typed_wrong.pop(question.field, None)
        value: Any = text
        if question.form == "lines":
            value = _lines(text)
        elif question.form == "named_lines":
            value = {}
            for line in _lines(text):
                name, equals, path = (part.strip() for part in line.partition("="))
                if not equals:
                    self._typed_wrong[question.field] = f"`{line.strip()}`: write name = path"
                elif name in value:
                    self._typed_wrong[question.field] = f"`{name}` is given twice"
                else:
                    value[name] = path
            self._forget_thresholds(value)
        elif not text and _may_be_empty(question.field):
            value = None
        elif question.field == "model.source" and self.get("model.revision") is not None:
            self.set("model.revision", None)  # it was a revision of another model
        self.set(question.field, value)

    def can_be_typed(self, question: Question) -> bool:
        """Whether the answer survives being shown and typed. A path with a line break or another
        control character in it, from an answers file, does not."""
        text = self.text(question)
        if not text:
            return True
        other = Draft({})
        other.answer(question, text)
        same = other.get(question.field) == self.get(question.field)
        lines = question.form in ("lines", "named_lines")
        return printable(text) == text and (same if lines else "\n" not in text)

    def _forget_thresholds(self, sets: Mapping[str, str]) -> None:
        """A set that is no longer held out has no share of exact answers to reach."""
        field = "evaluate.min_exact_match"
        if thresholds := self.get(field):
            self.set(field, {name: x for name, x in thresholds.items() if name in sets})

    def check(self) -> tuple[Answers | None, dict[str, str]]:
        """The answers, if all are good; else what is wrong, by question's field.

        A fault that belongs to no field is under the empty name."""
        faults = dict(self._typed_wrong)
        try:
            answers = Answers.model_validate(self.values)
            return (None, faults) if faults else (answers, {})
        except ValidationError as error:
            fields = [question.field for step in STEPS for question in step.questions]
            for fault in error.errors():
                location = ".".join(str(part) for part in fault["loc"])
                near = [name for name in fields if f"{location}.".startswith(f"{name}.")]
                message = fault["msg"].removeprefix("Value error, ")
                if fault["type"] == "missing":
                    message = "is needed"
                if not near and location:
                    message = f"{location}: {message}"
                faults.setdefault(near[0] if near else "", message)
            return None, faults


def _may_be_empty(field: str) -> bool:
    return type(None) in get_args(field_type(field)) or (
        get_origin(field_type(field)) is Annotated
        and type(None) in get_args(get_args(field_type(field))[0])
    )


def _lines(text: str) -> list[str]:
    """The lines with something in them; only a line feed ends a line, as in the control."""
    return [line for line in text.split("\n") if line.strip()]
