"""The configuration's section `data`: which conversations, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["none", "high"]
"""What `[MODEL_SETTINGS]{"reasoning_effort": …}` may say to this model."""
EFFORTS: tuple[Effort, ...] = get_args(Effort)

Policy = Literal["error", "warn", "drop", "fix"]
"""What becomes of a sample whose thinking is not in order."""

ThinkingCase = Literal["under_none", "missing", "empty", "unclosed", "no_answer"]
"""How thinking can be out of order."""

Format = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"
]
"""How the records of a data file are written; see `ms4.data.formats`."""

FieldName = Literal[
    "messages",
    "role",
    "content",
    "thinking",
    "tool_calls",
    "tool_call_id",
    "name",
    "weight",
    "system",
    "prompt",
    "completion",
    "history",
    "tools",
    "effort",
    "text",
    "images",
]
"""Fields of a record or of its messages that data may call otherwise."""

Role = Literal["system", "user", "assistant", "tool"]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ImagesSection(Section):
    """Images in the data."""

    roots: tuple[str, ...] = ()
    """Directories, beside that of the data file, that paths of images may lead into."""

    allow_http: bool = False
    """Fetch images that are given by an http or https URL."""

    max_size: int = Field(default=1540, ge=28, le=1540)
    """Longest side in pixels that an image is scaled down to; smaller takes fewer tokens."""


class DataSection(Section):
    """Which conversations, and how they become tokens."""

    train: tuple[str, ...] = Field(min_length=1)
    """What to train on: files (JSONL, JSON, Parquet, Arrow, CSV, TSV, text; also as .gz or .zst),
    patterns like `sets/*.jsonl`, or data sets of the hub: `hub:owner/name@REVISION#SPLIT`."""

    test: dict[Name, str] = Field(default_factory=dict)
    """Held-out sets by name: files of the same kinds, never trained on."""

    format: Format = "auto"
    """How records are written: `auto` (told from the first records of each file), `messages`
    (OpenAI), `sharegpt`, `alpaca`, `prompt_completion`, `question_answer` or `text`."""

    fields: dict[FieldName, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    """What the data calls a field, where it is not the usual name: `{messages: dialog, role:
    speaker, content: utterance}` or `{prompt: task, completion: solution, effort: mode}`."""

    roles: dict[str, Role] = Field(default_factory=dict)
    """What the data calls a role, where it is not the usual name: `{bot: assistant}`."""

    weights: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)
    """Entry of `train` → how often each of its samples is taken in an epoch (default 1). Of a
    fraction, so large a share is taken, chosen by the samples' content."""

    modality: Literal["text", "text_vision"] = "text"
    """What the conversations hold: `text` (a sample with images is a fault) or `text_vision`
    (text and images)."""

    reasoning: Literal["none", "high", "per_sample"] = "per_sample"
    """Reasoning effort of the training samples: one for all, or each sample's own
    `reasoning_effort` field (without one: `high` if it holds thinking, else `none`)."""

    thinking: dict[ThinkingCase, Policy] = Field(default_factory=dict)
    """What becomes of a training sample whose thinking is not in order, by case: `error` (the
    default) stops, `warn` takes it as it is and counts it, `drop` leaves it out, `fix` mends it.
    `under_none`: thinking under effort `none` (`fix` removes it); `missing`: none in the last turn
    under `high` (`fix` takes the sample under `none`, without thinking); `empty` (`fix` removes
    it); `unclosed`: no end, or an end alone (`fix` closes it if an answer follows); `no_answer`:
    the answer is inside the thinking, or missing (`fix` takes what follows an end of thinking)."""

    earlier_thinking: Literal["keep", "mask", "drop"] = "keep"
    """Thinking in turns before the last: `keep` trains it, `mask` shows it and does not train it,
    `drop` leaves it out."""

    untrained: tuple[Literal["earlier_turns", "thinking", "tool_calls"], ...] = ()
    """What of the assistant's turns is shown and not trained. A message's own `weight` 0 (or
    `train: false`) takes it out in any case."""

    sequence_length: int = Field(default=2048, ge=16, le=1_048_576)
    """Tokens in a packed sequence; no sample may be longer."""

    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a training sample of more than `sequence_length` tokens. `truncate` cuts it
    after its last turn of the assistant that fits. Plain text is always cut into pieces."""

    faulty: Literal["error", "drop"] = "error"
    """What to do with a training record that cannot be used: `error` stops and lists all of them,
    `drop` leaves them out and lists them."""

    packing: Literal["best_fit", "length_grouped", "none"] = "best_fit"
    """How samples share sequences: `best_fit` fills them; `length_grouped` and `none` put one
    sample in each, and `length_grouped` reads those of similar length together."""

    holdout: float = Field(default=0.0, ge=0, le=0.5)
    """Share of the training samples that is held out as the set `holdout`, chosen by content: a
    sample stays on its side in every run."""

    images: ImagesSection = ImagesSection()
    """Images in the data."""
