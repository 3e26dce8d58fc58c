"""Records → samples in tokens: in parallel, in order, the same for any number of processes.

Each record ends as exactly one outcome: a sample, or the reason why it is none.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ms4.config_data import DataSection, Effort, FieldName, Format
from ms4.data import formats, images, split
from ms4.data.chat import Chat, Encoded, Masking
from ms4.data.conversation import Conversation
from ms4.data.faults import SampleDropped, SampleFault
from ms4.data.formats import Reading
from ms4.data.processes import Processes, ProcessKilled
from ms4.data.readers import Row, parse_row, read_rows
from ms4.data.reasoning import settle
from ms4.data.sources import Source
from ms4.errors import Ms4Error

Int32s = npt.NDArray[np.int32]
Uint8s = npt.NDArray[np.uint8]
Made = TypeVar("Made")

LOOKED_AT = 100
"""Records of a file that its format is told from."""
_BATCH_BYTES = 256 << 10
_BATCH_ROWS = 256
PARALLEL_BYTES = 4 << 20
"""Data of fewer bytes is done before processes for it are up."""


@dataclass(frozen=True)
class Recipe:
    """How records become samples."""

    data: DataSection
    with_images: bool = False
    """Encode images; else a sample that holds one is refused."""
    signatures: bool = False
    """Make what near duplicates are found by."""
    base: Path = Path()
    """What relative roots of images are relative to."""

    @property
    def masking(self) -> Masking:
        """What of the assistant's turns is trained."""
        untrained = self.data.untrained
        return Masking(
            turns="last" if "earlier_turns" in untrained else "all",
            thinking="thinking" not in untrained,
            tool_calls="tool_calls" not in untrained,
            earlier_thinking=self.data.earlier_thinking != "mask",
        )

    def resolved(self, conversation: Conversation, source: Source) -> Conversation:
        """The conversation with the bytes of its images.

        Raises:
            SampleFault: it may hold none, or one of them cannot be had.
        """
        if not conversation.images:
            return conversation
        if not self.with_images:
            raise SampleFault(
                "holds images, and data.modality is `text`; set it to `text_vision`, or remove "
                "the sample or its images"
            )
        given = self.data.images
        roots = tuple(self.base / root for root in given.roots)
        rules = images.ImageRules(roots=roots, allow_http=given.allow_http)
        return images.resolve(conversation, source.path, rules)


@dataclass
class Sample:
    """A record in tokens."""

    key: bytes
    effort: Effort
    encoded: Encoded
    trained_tokens: int
    turns: int
    """Of the assistant."""
    thinks: bool
    plain: bool
    truncated: bool
    notes: tuple[str, ...]
    conversation: Conversation | None
    """Of a sample that is held out, and only of one."""
    signature: npt.NDArray[np.uint32] | None


def documents(sample: Sample, length: int) -> Iterator[tuple[Int32s, Uint8s]]:
    """Tokens and mask of the documents that a sample is: one, or the pieces of a plain text."""
    tokens, trained = sample.encoded.tokens, sample.encoded.trained
    for start in range(0, len(tokens), length):
        yield tokens[start : start + length], trained[start : start + length]


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    line: int | None
    sample: Sample | None = None
    refused: str = ""
    """Why there is no sample, and what to do."""
    fault: bool = True
    """False: a policy of the configuration left it out."""
    too_long: int = 0
    """Its tokens, if it was refused for their number."""
    records: int = 1
    of_file: bool = False
    """The fault is the file's, and not that of a record which could be left out."""


@dataclass
class Batch:
    """Outcomes of rows that follow one another, and what was seen in them."""

    outcomes: list[Outcome]
    unused: set[str] = field(default_factory=set)
    """Keys that nothing was made of."""
    mapped: set[FieldName] = field(default_factory=set)
    """Which of `data.fields` were found."""


@dataclass
class FileResult:
    """One file: how it is read, and its outcomes, which must be taken before the rest is true."""

    source: Source
    format: Format
    batches: Iterator[Batch]


class Preparer:
    """Makes samples of rows."""

    def __init__(self, chat: Chat, recipe: Recipe) -> None:
        self._chat = chat
        self._recipe = recipe

    def batch(self, rows: list[Row], reading: Reading, source: Source) -> Batch:
        """The outcomes of these rows."""
        result = Batch([])

        def told(why: Exception) -> str:
            return formats.in_its_names(str(why), reading)

        for row in rows:
            try:
                changed: Counter[str] = Counter()
                record = parse_row(row, changed)
                result.unused |= formats.unused_keys(record, reading)
                if reading.fields:
                    result.mapped |= formats.mapped_fields(record, reading)
                outcome = self._outcome(row, formats.to_conversation(record, reading), source)
                if outcome.sample is not None:
                    outcome.sample.encoded.changed.update(changed)
            except SampleDropped as reason:
                outcome = Outcome(row.line, refused=told(reason), fault=False)
            except SampleFault as fault:
                outcome = Outcome(
                    row.line, refused=told(fault), records=row.records, of_file=row.ends
                )
            result.outcomes.append(outcome)
        return result

    def _outcome(self, row: Row, conversation: Conversation, source: Source) -> Outcome:
        data = self._recipe.data
        key = conversation.key()
        settled = settle(conversation, data)
        conversation = settled.conversation
        conversation = self._recipe.resolved(conversation, source)
        encoded = self._chat.encode(conversation, settled.effort, self._recipe.masking)
        length, plain = len(encoded.tokens), conversation.plain is not None
        truncated = False
        if length > data.sequence_length and not plain:
            if data.too_long != "truncate":
                way_out = (
                    "raise it or shorten the sample (data.too_long is `drop`)"
                    if data.too_long == "drop"
                    else "raise it, shorten the sample, or set data.too_long to `drop` or "
                    "`truncate`"
                )
                return Outcome(
                    row.line,
                    refused=f"{length} tokens, but data.sequence_length is {data.sequence_length}; "
                    f"{way_out}",
                    fault=data.too_long == "error",
                    too_long=length,
                )
            shorter = self._truncated(conversation, encoded, settled.effort)
            if isinstance(shorter, str):
                return Outcome(
                    row.line,
                    refused=f"{length} tokens, and {shorter}; raise it or shorten the sample",
                    fault=False,
                    too_long=length,
                )
            (conversation, encoded), truncated = shorter, True
        if plain:  # nothing stands before a piece's first token that it could follow from
            encoded.trained[:: data.sequence_length] = 0
        trained_tokens = int(np.count_nonzero(encoded.trained))
        if not trained_tokens:
            raise SampleFault(
                "nothing of it would be trained: its turns have weight 0, or hold only what "
                "data.untrained or data.earlier_thinking leaves out; remove it"
            )
        held_out = data.holdout > 0 and not plain and split.held_out(key, data.holdout)
        return Outcome(
            row.line,
            Sample(
                key=key,
                effort=settled.effort,
                encoded=encoded,
                trained_tokens=trained_tokens,
                turns=len(conversation.assistant_turns),
                thinks=conversation.has_thinking,
                plain=plain,
                truncated=truncated,
                notes=settled.notes,
                conversation=conversation if held_out else None,
                signature=split.signature(split.text_of(conversation))
                if self._recipe.signatures and not plain
                else None,
            ),
        )

    def _truncated(
        self, conversation: Conversation, encoded: Encoded, effort: Effort
    ) -> tuple[Conversation, Encoded] | str:
        """The longest beginning that fits, ends with a turn of its effort, and is trained; or why
        there is none."""
        limit = self._recipe.data.sequence_length
        stops: list[int] = []  # messages up to and with each turn of the assistant
        for index, message in enumerate(conversation.messages):
            last = index + 1 == len(conversation.messages)
            if message.role == "assistant" and (
                last or conversation.messages[index + 1].role != "assistant"
            ):
                stops.append(index + 1)
        why: Counter[str] = Counter()
        turns = list(zip(encoded.turn_ends.tolist(), stops, strict=True))
        for (end, taken), turn in zip(
            reversed(turns), reversed(conversation.assistant_turns), strict=True
        ):
            if end > limit:
                continue
            if effort == "high" and not any(message.has_thinking for message in turn):
                why["without the thinking of its effort"] += 1
                continue
            if any(message.tool_calls for message in turn):
                why["with a tool call, whose result is cut off"] += 1
                continue
            shorter = replace(conversation, messages=conversation.messages[:taken])
            again = self._chat.encode(shorter, effort, self._recipe.masking)
            if again.trained.any():
                return shorter, again
            why["with nothing trained up to there"] += 1
        if not why:
            return f"no turn of the assistant ends within data.sequence_length {limit}"
        ends = ", ".join(f"{number} {reason}" for reason, number in why.items())
        return f"none of its turns within data.sequence_length {limit} can be its end ({ends})"


# Processes.


Columns = dict[str, Iterable[Any]]
_NONE = np.zeros(0, dtype=np.int32)
_BARE = Encoded(_NONE, _NONE.astype(np.uint8), _NONE.astype(np.int64))


def _columns(objects: Sequence[Row | Outcome | Sample]) -> Columns:
    """The values of each field of objects of one kind: sent several times faster than these."""
    values = (vars(one).values() for one in objects)
    return dict(zip(vars(objects[0]), zip(*values, strict=True), strict=True)) if objects else {}


def _objects(kind: Callable[..., Made], columns: Columns) -> list[Made]:
    """What the columns were made of."""
    return [kind(*values) for values in zip(*columns.values(), strict=True)]


@dataclass
class _Sent:
    """A batch on its way between processes, its arrays as one of each kind."""

    rest: Batch
    """But for its outcomes."""
    outcomes: Columns
    samples: Columns
    beside: list[tuple[tuple[images.EncodedImage, ...], Counter[str]] | None]
    """Of each sample, what it has beside its arrays: images and changes; None: neither."""
    lengths: list[int]
    tokens: Int32s
    trained: Uint8s

    @classmethod
    def of(cls, batch: Batch) -> _Sent:
        samples = [o.sample for o in batch.outcomes if o.sample is not None]
        encoded = [sample.encoded for sample in samples]
        there = [outcome.sample is not None for outcome in batch.outcomes]
        return cls(
            rest=replace(batch, outcomes=[]),
            outcomes=_columns(batch.outcomes) | {"sample": there},
            samples=_columns(samples) | {"encoded": ()},
            beside=[(e.images, e.changed) if e.images or e.changed else None for e in encoded],
            lengths=[len(e.tokens) for e in encoded],
            tokens=np.concatenate([_NONE, *(e.tokens for e in encoded)]),
            trained=np.concatenate([_BARE.trained, *(e.trained for e in encoded)]),
        )

    def received(self) -> Batch:
        """The batch; its samples' turns cannot be cut any more."""
        nothing = (_BARE.images, _BARE.changed)
        encoded = []
        start = 0
        for beside, length in zip(self.beside, self.lengths, strict=True):
            end = start + length
            tokens, trained = self.tokens[start:end], self.trained[start:end]
            encoded.append(Encoded(tokens, trained, _BARE.turn_ends, *(beside or nothing)))
            start = end
        samples = iter(_objects(Sample, self.samples | {"encoded": encoded}))
        there = [next(samples) if there else None for there in self.outcomes["sample"]]
        return replace(self.rest, outcomes=_objects(Outcome, self.outcomes | {"sample": there}))


Pool = Processes[[Columns, Reading, Source], _Sent]


class Workers:
    """Runs a preparer in this process or in several."""

    def __init__(self, preparer: Preparer, pool: Pool | None, count: int) -> None:
        self._preparer = preparer
        self._pool = pool
        self._window = 4 * count

    def batches(self, rows: Iterable[Row], reading: Reading, source: Source) -> Iterator[Batch]:
        """The outcomes of all rows, in their order.

        Raises:
            Ms4Error: a process was killed.
        """
        if self._pool is None:
            for batch in _batched(rows):
                yield self._preparer.batch(batch, reading, source)
            return
        waiting: deque[Future[_Sent]] = deque()
        try:
            for batch in _batched(rows):
                waiting.append(self._pool.submit(_columns(batch), reading, source))
                if len(waiting) >= self._window:
                    yield waiting.popleft().result().received()
            while waiting:
                yield waiting.popleft().result().received()
        except ProcessKilled as error:
            raise Ms4Error(
                "a process that turns conversations into tokens was killed, for want of memory "
                "perhaps; the same command starts again"
            ) from error


@contextmanager
def started(chat: Chat, recipe: Recipe, count: int, size: int) -> Iterator[Workers]:
    """Workers for so many bytes of data.

    Args:
        chat: the tokenizer.
        recipe: how records become samples.
        count: processes.
        size: bytes of the data; little of it is done in this process.
    """
    preparer = Preparer(chat, recipe)
    if count < 2 or size < PARALLEL_BYTES:
        yield Workers(preparer, None, 1)
        return

    def work(rows: Columns, reading: Reading, source: Source) -> _Sent:
        return _Sent.of(preparer.batch(_objects(Row, rows), reading, source))

    with Processes(count, work) as pool:
        yield Workers(preparer, pool, count)


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.value) if isinstance(row.value, bytes) else 1024
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def read_files(
    sources: Iterable[Source],
    workers: Workers,
    data: DataSection,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Iterator[FileResult]:
    """Yield each source with its outcomes, which must be taken before the next source."""
    for source in sources:
        format, rows = looked_at(source, data, on_bytes)
        reading = Reading.of(format, data)
        batches = workers.batches(rows, reading, source)
        yield FileResult(source, format, _checked(batches, reading))


def looked_at(
    source: Source, data: DataSection, on_bytes: Callable[[int], None]
) -> tuple[Format, Iterator[Row]]:
    """The format of a source, from its first records, and all of its rows."""
    rows = read_rows(source, on_bytes)
    first = list(islice(rows, LOOKED_AT))
    return formats.detect(_parsed(first), data), chain(first, rows)


def _parsed(rows: list[Row]) -> Iterator[Any]:
    for row in rows:
        try:
            yield parse_row(row, Counter())
        except SampleFault:
            continue


def _checked(batches: Iterator[Batch], reading: Reading) -> Iterator[Batch]:
    """The batches, and a fault of the file if a field of `data.fields` is in none of them."""
    mapped: set[FieldName] = set()
    records = 0
    for batch in batches:
        mapped |= batch.mapped
        records += len(batch.outcomes)
        yield batch
    missing = [name for name in reading.fields if name not in mapped]
    if missing and records:
        names = ", ".join(f"`{reading.fields[name]}` ({name})" for name in missing)
        fault = f"no record has {names}, which data.fields names; correct the name or remove it"
        yield Batch([Outcome(None, refused=fault, records=0, of_file=True)])
