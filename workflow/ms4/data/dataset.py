"""The stage `preprocess`: conversations in JSONL → packed tokens, masks and test prompts.

All data is read and checked before anything is written, and all faults are reported together.
The same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ms4 import manifest
from ms4.config import EFFORTS, DataSection, Effort, RunConfig
from ms4.data.chat import Chat, Encoded
from ms4.data.conversation import Conversation, read_conversations
from ms4.data.faults import Faults, SampleFault
from ms4.data.packing import pack
from ms4.data.progress import ByteProgress
from ms4.errors import Ms4Error

SOURCE = Path("weights/source.json")
TRAIN = Path("data/packed/train.safetensors")
TEST = Path("data/packed/test.jsonl")
FAULTS = Path("data/faults.txt")
RESULT = Path("results/data.json")

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Uint8s = npt.NDArray[np.uint8]

_DTYPES: dict[str, Any] = {
    "tokens": np.int32,
    "trained": np.uint8,
    "document_starts": np.int64,
    "bin_documents": np.int64,
    "bin_starts": np.int64,
}

EXAMPLE_CHARACTERS = 600
_STRETCH_CHARACTERS = 160


@dataclass(frozen=True)
class PackedData:
    """The training data as docs/design.md describes it under "Packed data"."""

    tokens: Int32s
    trained: Uint8s
    document_starts: Int64s
    bin_documents: Int64s
    bin_starts: Int64s

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.document_starts) - 1

    @property
    def bins(self) -> int:
        """Number of bins."""
        return len(self.bin_starts) - 1

    def bin(self, number: int) -> Int64s:
        """The numbers of the documents in a bin."""
        return self.bin_documents[self.bin_starts[number] : self.bin_starts[number + 1]]

    def document(self, number: int) -> tuple[Int32s, Uint8s]:
        """Tokens and trained mask of a document."""
        span = slice(self.document_starts[number], self.document_starts[number + 1])
        return self.tokens[span], self.trained[span]


@dataclass(frozen=True)
class TestSample:
    """A held-out sample in one reasoning effort: a line of `test.jsonl`."""

    __test__ = False  # not for pytest to collect

    set: str
    """Name of the held-out set."""
    line: int
    """Line in the set's file, from 1."""
    effort: Effort
    prompt: list[int]
    """Ends where the model begins to write its last turn."""
    tokens: list[int] | None
    """The whole conversation as the model should have written it; None under `high` if the
    sample's last turn holds no thinking."""
    trained: list[int] | None
    answer: str
    """The last turn as `Chat.decode_answer` gives it: without thinking, white space stripped."""


def load_packed(path: Path) -> PackedData:
    """Read `train.safetensors`.

    Raises:
        Ms4Error: it is missing or not what `preprocess` writes.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise Ms4Error(
            f"{path} is missing: run `ms4 preprocess` (or `snakemake`) first."
        ) from error
    except (OSError, SafetensorError) as error:
        raise Ms4Error(f"{path}: cannot be read ({error}); run `ms4 preprocess` again.") from error
    found = {name: tensor.dtype for name, tensor in tensors.items()}
    if found != {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}:
        raise Ms4Error(f"{path}: not the tensors of packed data; run `ms4 preprocess` again.")
    return PackedData(**tensors)


def read_test(path: Path) -> Iterator[TestSample]:
    """Yield the lines of `test.jsonl`.

    Raises:
        Ms4Error: it is missing or not what `preprocess` writes.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield TestSample(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise Ms4Error(
                        f"{path}:{number}: not a line of `ms4 preprocess`; run it again."
                    ) from error
    except OSError as error:
        raise Ms4Error(
            f"{path}: cannot be read ({error.strerror}); run `ms4 preprocess` first."
        ) from error


def training_effort(conversation: Conversation, reasoning: str) -> Effort:
    """The reasoning effort that a training sample is encoded with.

    Args:
        conversation: the sample.
        reasoning: `data.reasoning` of the configuration.

    Raises:
        SampleFault: the sample's thinking contradicts its effort.
    """
    effort: Effort
    if reasoning == "per_sample":
        derived: Effort = "high" if conversation.has_thinking else "none"
        effort = conversation.effort or derived
        why, way_out = "it is", "correct its `reasoning_effort`, or"
    else:
        effort = "none" if reasoning == "none" else "high"
        why, way_out = f"data.reasoning is `{reasoning}`, so it is", "use `per_sample`, or"
    if effort == "none" and conversation.has_thinking:
        raise SampleFault(
            f"holds thinking, but {why} of effort `none`; {way_out} remove the thinking"
        )
    if effort == "high" and not conversation.ends_with_thinking:
        raise SampleFault(
            f"the last turn does not think, but {why} of effort `high`; {way_out} "
            "add thinking to that turn"
        )
    return effort


@dataclass
class _Training:
    """What reading the training files gave."""

    encoded: list[Encoded]
    efforts: list[Effort]
    first: str = ""
    """Place of the first sample that was kept, for the example."""
    samples: int = 0
    too_long: int = 0
    longest_tokens: int = 0
    longest_place: str = ""


def _read_training(
    data: DataSection,
    chat: Chat,
    faults: Faults,
    held_out: dict[bytes, str],
    on_bytes: Callable[[int], None],
) -> _Training:
    training = _Training(encoded=[], efforts=[])
    for path in data.train:
        for line, conversation in read_conversations(path, faults, on_bytes):
            training.samples += 1
            twin = held_out.get(conversation.key())
            if twin is not None:
                faults.add(
                    path,
                    line,
                    f"stands word for word in a held-out set ({twin}), which would make the "
                    "evaluation lie; remove it from one of them",
                )
            try:
                effort = training_effort(conversation, data.reasoning)
                encoded = chat.encode(conversation, effort)
            except SampleFault as fault:
                faults.add(path, line, str(fault))
                continue
            length = len(encoded.tokens)
            if length > data.sequence_length:
                training.too_long += 1
                if length > training.longest_tokens:
                    training.longest_tokens, training.longest_place = length, f"{path}:{line}"
                if data.too_long == "error":
                    faults.add(
                        path,
                        line,
                        f"{length} tokens, but data.sequence_length is {data.sequence_length}; "
                        "raise it, shorten the sample, or set data.too_long to `drop`",
                    )
                continue
            training.first = training.first or f"{path}:{line}"
            training.encoded.append(encoded)
            training.efforts.append(effort)
    return training


def _read_held_out(
    data: DataSection,
    chat: Chat,
    faults: Faults,
    out: TextIO,
    on_bytes: Callable[[int], None],
) -> tuple[dict[str, dict[str, int]], dict[bytes, str]]:
    """Write the test samples to `out`; returns counts by set and places by key."""
    counts: dict[str, dict[str, int]] = {}
    places: dict[bytes, str] = {}
    for name, path in data.test.items():
        count = counts[name] = {"samples": 0, "tokens": 0}
        for line, conversation in read_conversations(path, faults, on_bytes):
            places.setdefault(conversation.key(), f"{name}, {path}:{line}")
            try:
                samples = _test_samples(chat, name, line, conversation)
            except SampleFault as fault:
                faults.add(path, line, str(fault))
                continue
            count["samples"] += 1
            for sample in samples:
                count["tokens"] += len(sample.tokens or ())
                out.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")
    return counts, places


def _test_samples(chat: Chat, name: str, line: int, conversation: Conversation) -> list[TestSample]:
    """A held-out conversation in every effort, whichever of them is evaluated."""
    for turn in conversation.assistant_turns:
        if not any(message.text.strip() or message.tool_calls for message in turn):
            raise SampleFault("a turn of nothing but thinking has no answer; add one")
    plain = conversation.without_thinking()
    encoded = {"none": chat.encode(plain, "none"), "high": chat.encode(conversation, "high")}
    last_turn = encoded["none"].tokens[encoded["none"].last_turn :].tolist()
    _, answer, _ = chat.decode_answer(last_turn, "none")
    samples = []
    for effort in EFFORTS:
        whole = effort == "none" or conversation.ends_with_thinking
        samples.append(
            TestSample(
                set=name,
                line=line,
                effort=effort,
                prompt=encoded[effort].prompt.tolist(),
                tokens=encoded[effort].tokens.tolist() if whole else None,
                trained=encoded[effort].trained.tolist() if whole else None,
                answer=answer,
            )
        )
    return samples


def _pack(training: _Training, sequence_length: int) -> PackedData:
    lengths = np.array([len(encoded.tokens) for encoded in training.encoded], dtype=np.int64)
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    bin_documents, bin_starts = pack(lengths, sequence_length)
    return PackedData(
        tokens=np.concatenate([encoded.tokens for encoded in training.encoded]),
        trained=np.concatenate([encoded.trained for encoded in training.encoded]),
        document_starts=starts,
        bin_documents=bin_documents,
        bin_starts=bin_starts,
    )


def _load_chat() -> Chat:
    """The tokenizer of the weights, checked against their manifest."""
    source = manifest.read_manifest(SOURCE, "fetch")
    directory = Path(source["directory"])
    entries = [entry for entry in source["files"] if entry["path"] == "tekken.json"]
    if not entries:
        raise Ms4Error(f"{SOURCE}: lists no tekken.json. Remove it and run `ms4 fetch` again.")
    manifest.check_files({**source, "files": entries}, directory, hashes=True)
    return Chat(directory / "tekken.json")


def _summary(training: _Training, packed: PackedData, sequence_length: int) -> dict[str, Any]:
    """The part `train` of the manifest."""
    by_effort: dict[str, Counter[str]] = {effort: Counter() for effort in EFFORTS}
    for encoded, effort in zip(training.encoded, training.efforts, strict=True):
        by_effort[effort]["samples"] += 1
        by_effort[effort]["tokens"] += len(encoded.tokens)
        by_effort[effort]["trained_tokens"] += int(encoded.trained.sum())
    return {
        "samples": training.samples,
        "documents": packed.documents,
        "tokens": len(packed.tokens),
        "trained_tokens": int(packed.trained.sum()),
        "dropped": training.too_long,
        "bins": packed.bins,
        "fill": round(len(packed.tokens) / (packed.bins * sequence_length), 6),
        "longest": int(np.diff(packed.document_starts).max()),
        "by_effort": {
            effort: {key: count[key] for key in ("samples", "tokens", "trained_tokens")}
            for effort, count in by_effort.items()
        },
    }


def render_example(chat: Chat, encoded: Encoded) -> str:
    """A sample as the model sees it, control tokens by name, what is trained between ⟦ and ⟧."""
    changes = np.flatnonzero(np.diff(encoded.trained)) + 1
    stretches = []
    for tokens, trained in zip(
        np.split(encoded.tokens, changes), np.split(encoded.trained, changes), strict=True
    ):
        text = chat.decode(tokens)
        if len(text) > _STRETCH_CHARACTERS:
            half = _STRETCH_CHARACTERS // 2
            text = f"{text[:half]} … {text[-half:]}"
        stretches.append(f"⟦{text}⟧" if trained[0] else text)
    example = "".join(stretches)
    if len(example) > EXAMPLE_CHARACTERS:
        example = example[:EXAMPLE_CHARACTERS] + " …"
    return example


def _print_statement(
    config: RunConfig,
    chat: Chat,
    training: _Training,
    train: dict[str, Any],
    test: dict[str, dict[str, int]],
) -> None:
    length = config.data.sequence_length
    efforts = ", ".join(
        f"{count['samples']:,} {effort}" for effort, count in train["by_effort"].items()
    )
    share = train["trained_tokens"] / train["tokens"]
    print(
        f"training data: {_count(train['documents'], 'sample')} ({efforts}), "
        f"{train['tokens']:,} tokens, {share:.1%} of them trained\n"
        f"packed into {_count(train['bins'], 'sequence')} of {length:,} tokens, "
        f"{train['fill']:.1%} full; the longest sample has {train['longest']:,} tokens"
    )
    if training.too_long:
        print(f"dropped: {_too_long(training, length)}")
    for name, count in test.items():
        print(f"held-out set {name}: {_count(count['samples'], 'sample')}")
    print(
        f"what the model sees of {training.first}, with ⟦what is trained⟧:\n"
        f"{render_example(chat, training.encoded[0])}",
        flush=True,
    )


def _too_long(training: _Training, length: int) -> str:
    are = "is" if training.too_long == 1 else "are"
    return (
        f"{_count(training.too_long, 'sample')} {are} longer than data.sequence_length {length:,}; "
        f"the longest, {training.longest_place}, has {training.longest_tokens:,} tokens"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def run_stage(config: RunConfig) -> None:
    """Turn the configured conversations into packed tokens in the current project.

    Raises:
        Ms4Error: names all that is wrong with the data.
    """
    chat = _load_chat()
    data = config.data
    faults = Faults(config.data_files())
    paths = [Path(name) for name in config.data_files()]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    TEST.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in TEST.parent.glob(".*.tmp"):
        left_by_a_kill.unlink()
    temporary = TEST.with_name(f".{TEST.name}.{os.getpid()}.tmp")
    try:
        with (
            temporary.open("w", encoding="utf-8") as out,
            ByteProgress("conversations", size) as progress,
        ):
            # Held-out sets first: a training sample is then looked up among theirs.
            test, held_out = _read_held_out(data, chat, faults, out, progress.advance)
            training = _read_training(data, chat, faults, held_out, progress.advance)
        refused = training.too_long and data.too_long == "error"
        faults.raise_any(FAULTS, _too_long(training, data.sequence_length) if refused else "")
        if not training.encoded:
            raise Ms4Error(
                f"nothing is left to train on: {_too_long(training, data.sequence_length)}. "
                "Raise data.sequence_length."
            )
        manifest.commit_file(temporary, TEST)
    finally:
        temporary.unlink(missing_ok=True)

    packed = _pack(training, data.sequence_length)
    temporary = TRAIN.with_name(f".{TRAIN.name}.{os.getpid()}.tmp")
    save_file({name: getattr(packed, name) for name in _DTYPES}, temporary)
    manifest.commit_file(temporary, TRAIN)

    train = _summary(training, packed, data.sequence_length)
    manifest.write_manifest(
        RESULT,
        "preprocess",
        config_hash=config.part_hash("preprocess"),
        inputs=[SOURCE, *paths],
        files=[manifest.file_entry(path, Path()) for path in (TRAIN, TEST)],
        train=train,
        test=test,
    )
    _print_statement(config, chat, training, train, test)
