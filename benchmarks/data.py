"""Data: tokens a second against mistral-common's own loop, two processes against one, TRL, memory.

`encode` compares CPU time for the same ids and masks, which are asserted to be equal: conversations
of six to ten turns against a loop over mistral-common's `encode_chat_completion` that finds its
masks by encoding each conversation up to the beginning and up to the end of every assistant turn;
single questions (GSM8K) against the same loop without masks. `scaling` and `memory` run the stage
`preprocess` as a process of its own. `trl` prepares the same file with TRL's SFT trainer, whose
Python is named by --trl (a virtual environment of its own). What to run is named on the command
line; without arguments everything but `trl` runs. Texts come from the directory MS4_TEST_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from common import public_data, record_part, run
from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.data.tekken import write_tekken
from ms4.manifest import file_entry, write_json, write_manifest

ROUNDS = 5
"""Each way takes its turn so often; the middle ratio counts."""
PAIRS = 7
"""Of the stage with one process and with two; the middle ratio counts."""
SCALING_BYTES = 64 << 20
MEMORY_BYTES = (256 << 20, 4 << 30)
CLAIM = (
    "tokens a second of one core: at least 5 times mistral-common's loop with masks on six turns "
    "and more, at least 2 times its loop without masks on GSM8K; two processes at least 1.8 times "
    "one; memory flat on a file of 4 GB"
)
Record = dict[str, Any]


def texts() -> list[tuple[str, str]]:
    """Questions and answers of the public data."""
    lines = (
        (Path(os.environ["MS4_TEST_DATA"]) / "gsm8k/train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return [(row["question"], row["answer"]) for row in map(json.loads, lines)]


def conversations(pairs: list[tuple[str, str]], turns: tuple[int, int]) -> list[Record]:
    """Conversations with so many exchanges each, at least and at most."""
    dice = random.Random(0)  # noqa: S311 - not a secret
    made: list[Record] = []
    at = 0
    while at < len(pairs):
        count = dice.randint(*turns)
        messages = []
        for question, answer in pairs[at : at + count]:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        if len(messages) == 2 * count:
            made.append({"messages": messages})
        at += count
    return made


def theirs(mistral: Any, messages: list[Record]) -> list[int]:
    """mistral-common's ids."""
    request: Any = ChatCompletionRequest.from_openai(messages=messages, reasoning_effort="none")
    ids: list[int] = mistral.encode_chat_completion(request).tokens
    return ids


def theirs_with_masks(mistral: Any, messages: list[Record]) -> tuple[list[int], list[int]]:
    """Ids and mask, each assistant turn found by the length of what stands before its end."""
    ids = theirs(mistral, messages)
    mask = [0] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(theirs(mistral, messages[:number]))
            last = number == len(messages) - 1
            end = len(ids) if last else len(theirs(mistral, messages[: number + 1]))
            mask[start:end] = [1] * (end - start)
    return ids, mask


def compare(chat: Chat, mistral: Any, records: list[Record], masks: bool) -> dict[str, float]:
    """Tokens a CPU second of both ways, in turn, and the middle of the rounds' ratios."""
    parsed = [parse_record(record) for record in records]
    tokens, rates = 0, []
    for number, (one, conversation) in enumerate(zip(records, parsed, strict=True)):
        encoded = chat.encode(conversation, "none")
        tokens += len(encoded.tokens)
        if number % 10 == 0:
            ids, mask = theirs_with_masks(mistral, one["messages"])
            if encoded.tokens.tolist() != ids or encoded.trained.tolist() != mask:
                sys.exit("ids or masks differ")
    for _ in range(ROUNDS):
        started = time.process_time()
        for conversation in parsed:
            chat.encode(conversation, "none")
        ours = time.process_time() - started
        started = time.process_time()
        for one in records:
            if masks:
                theirs_with_masks(mistral, one["messages"])
            else:
                theirs(mistral, one["messages"])
        rates.append((tokens / ours, tokens / (time.process_time() - started)))
    return {
        "conversations": len(records),
        "tokens": tokens,
        "ours_tokens_per_cpu_s": round(float(np.median([ours for ours, _ in rates]))),
        "theirs_tokens_per_cpu_s": round(float(np.median([their for _, their in rates]))),
        "ratio": round(float(np.median([ours / their for ours, their in rates])), 2),
    }


def encode(directory: Path) -> dict[str, Any]:
    """Ids and masks, in one process."""
    chat = Chat(tokenizer(directory))
    mistral = MistralTokenizer.from_file(directory / "tekken.json", mode=ValidationMode.agnostic)
    pairs = texts()
    return {
        "turns 6 to 10, with masks": compare(
            chat, mistral, conversations(pairs[:1600], (6, 10)), True
        ),
        "GSM8K, theirs without masks": compare(
            chat, mistral, conversations(pairs[:2000], (1, 1)), False
        ),
    }


def tokenizer(directory: Path) -> Path:
    """The tokenizer's file, made offline."""
    path = directory / "tekken.json"
    if not path.exists():
        write_tekken(path)
    return path


def write_data(path: Path, size: int) -> int:
    """A JSONL file of about `size` bytes, every record another one; returns the records."""
    lines = [
        [json.dumps(message) for message in record["messages"]]
        for record in conversations(texts(), (2, 4))
    ]
    dice = random.Random(1)  # noqa: S311 - not a secret
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            messages = ", ".join(dice.choice(lines))
            first = f'{{"role": "system", "content": "Conversation {count}"}}'
            written += file.write(f'{{"messages": [{first}, {messages}]}}\n')
            count += 1
    return count


def project(directory: Path, data: Path, threads: int) -> Path:
    """A project in which only `preprocess` can run."""
    root = directory / f"threads-{threads}"
    shutil.rmtree(root, ignore_errors=True)
    weights = root / "weights"
    weights.mkdir(parents=True)
    shutil.copy(tokenizer(directory), weights / "tekken.json")
    write_manifest(
        weights / "source.json",
        "fetch",
        config_hash="",
        inputs=[],
        files=[file_entry(weights / "tekken.json", weights)],
        directory="weights",
        source="benchmark",
        commit=None,
    )
    (root / "config").mkdir()
    write_json(
        root / "config/config.yaml",
        {
            "data": {"train": [str(data)], "sequence_length": 8192, "too_long": "drop"},
            "run": {"threads": threads},
        },
    )
    return root


def preprocess(directory: Path, data: Path, threads: int) -> dict[str, Any]:
    """What the stage took, and what it made."""
    root = project(directory, data, threads)
    taken: dict[str, Any] = dict(run(root, sys.executable, "-m", "ms4", "preprocess"))
    made = json.loads((root / "results/data.json").read_text())
    taken["tokens"] = made["train"]["tokens"]
    taken["fill"] = made["train"]["fill"]
    taken["files"] = [entry["sha256"] for entry in made["files"]]
    shutil.rmtree(root)
    return taken


def scaling(directory: Path) -> dict[str, Any]:
    """The stage with one process and with two."""
    data = directory / "scaling.jsonl"
    write_data(data, SCALING_BYTES)
    rounds = [[preprocess(directory, data, threads) for threads in (1, 2)] for _ in range(PAIRS)]
    empty = directory / "empty.jsonl"
    write_data(empty, 10_000)
    # Starting Python and loading the vocabulary is not what is to scale.
    start = min(preprocess(directory, empty, 1)["seconds"] for _ in range(3))
    if len({str(one["files"]) for pair in rounds for one in pair}) != 1:
        sys.exit("the number of processes changes the result")
    ratios = [(one["seconds"] - start) / (two["seconds"] - start) for one, two in rounds]
    return {
        "bytes": data.stat().st_size,
        "tokens": rounds[0][0]["tokens"],
        "start_seconds": start,
        "seconds": [[one["seconds"], two["seconds"]] for one, two in rounds],
        "cpu_seconds": [[one["cpu_seconds"], two["cpu_seconds"]] for one, two in rounds],
        "ratio": round(float(np.median(ratios)), 2),
        "tokens_per_s_on_two": round(
            rounds[0][0]["tokens"] / (min(two["seconds"] for _, two in rounds) - start)
        ),
    }


def memory(directory: Path) -> dict[str, Any]:
    """Peak memory of the stage by the size of its file."""
    found = {}
    for size in MEMORY_BYTES:
        data = directory / "memory.jsonl"
        records = write_data(data, size)
        taken = preprocess(directory, data, 2)
        del taken["files"]
        found[f"{size / 2**30:g} GiB"] = {"records": records, **taken}
        data.unlink()
    return found


TRL = """
import json, sys, time
import torch, transformers, trl
from datasets import load_dataset
from mistral_common.integrations.chat_templates.chat_templates import (
    convert_tokenizer_to_chat_template)

directory, data, out, way = sys.argv[1:]
torch.set_num_threads(1)
if way == "template":
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "</s>", "<pad>"
    tokenizer.chat_template = convert_tokenizer_to_chat_template(directory + "/tekken.json")
else:
    tokenizer = transformers.MistralCommonBackend.from_pretrained(directory, mode="finetuning")
rows = load_dataset("json", data_files=data, split="train", cache_dir=out)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=131072, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1))
config = trl.SFTConfig(
    output_dir=out, max_length=8192, packing=True, packing_strategy="bfd", report_to=[],
    assistant_only_loss=way == "masks", use_cpu=True, bf16=False)
started, cpu = time.perf_counter(), time.process_time()
trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
took, cpu = time.perf_counter() - started, time.process_time() - cpu
made = trainer.train_dataset
ids = [token for row in made["input_ids"] for token in row]
json.dump({
    "seconds": round(took, 1), "cpu_seconds": round(cpu, 1), "rows": len(made),
    "tokens": len(ids), "fill": round(len(ids) / (len(made) * 8192), 4),
    "begins": ids.count(1), "ends": ids.count(2), "columns": made.column_names,
    "trl": trl.__version__, "transformers": transformers.__version__,
}, open(out + "/out.json", "w"))
"""


def trl(directory: Path, python: Path) -> dict[str, Any]:
    """TRL's preparation of the same file with the same vocabulary, one process each."""
    data = directory / "trl.jsonl"
    records = write_data(data, 8 << 20)
    ours = preprocess(directory, data, 1)
    model = directory / "trl-tokenizer"
    model.mkdir(exist_ok=True)
    shutil.copy(tokenizer(directory), model / "tekken.json")
    found: dict[str, Any] = {"records": records, "ours": ours}
    for way in ("mistral-common", "template", "masks"):
        out = directory / f"trl-{way}"
        out.mkdir(exist_ok=True)
        try:
            taken = run(out, str(python), "-c", TRL, str(model), str(data), str(out), way)
        except SystemExit as stopped:
            found[way] = {"refused": str(stopped)[-400:]}
            continue
        made = json.loads((out / "out.json").read_text())
        made["peak_gib"] = taken["peak_gib"]
        found[way] = made
    return found


def main() -> None:
    """Run what is named, and record it."""
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        "encode": encode,
        "scaling": scaling,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="encode, scaling, memory, trl")
    parser.add_argument("--trl", type=Path, help="a Python that has TRL")
    given = parser.parse_args()
    if unknown := [part for part in given.parts if part not in {*ways, "trl"}]:
        parser.error(f"{', '.join(unknown)}: no part; there are {', '.join(ways)} and trl")
    if "trl" in given.parts and given.trl is None:
        parser.error(
            "trl: needs --trl PYTHON, a Python of a virtual environment that has trl, datasets and "
            "mistral-common; nothing was run"
        )
    if given.trl is not None and not given.trl.is_file():
        parser.error(f"--trl {given.trl}: no such file")
    parts = given.parts or [*ways]
    if public_data(", ".join(parts), required=bool(given.parts)) is None:
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for part in parts:
            figures = trl(directory, given.trl) if part == "trl" else ways[part](directory)
            record_part("data", CLAIM, part, figures)
    if not given.parts:
        print("skipped: trl: it needs --trl PYTHON")


if __name__ == "__main__":
    main()
