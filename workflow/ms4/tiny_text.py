"""Generated conversations: what the tiny model is first taught, and the task that tunes it.

The base learns short chat, copying, and digit arithmetic, with a short thinking trace under effort
`high` and none under `none`. The task "seal" is new to it, but made of what it knows: reverse the
digits, then add 3 to each modulo 10 (`3021: 1203 + 3: 4536`). The thinking traces of both are made
of the same few symbols, because a frozen head cannot learn to say what it never said.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ms4.manifest import write_text

Record = dict[str, Any]
Problem = tuple[str, str, str]
"""Question, thinking, answer."""

_GREETINGS = {
    "Hello": "Hello! How can I help?",
    "Hi there": "Hi! What can I do for you?",
    "Good morning": "Good morning! How can I help?",
    "Good evening": "Good evening! How can I help?",
    "Thank you": "You are welcome!",
    "Thanks a lot": "You are welcome!",
    "How are you?": "I am fine, thank you.",
    "Who are you?": "I am a small model.",
    "What can you do?": "I can copy and count digits.",
    "Goodbye": "Goodbye! See you soon.",
}
_NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hanna",
    "Ida",
    "Jonas",
    "Karl",
    "Lena",
    "Max",
    "Nora",
    "Otto",
    "Paul",
    "Rosa",
    "Simon",
    "Thea",
    "Viktor",
)
_NAMED = {
    "My name is {}.": "Nice to meet you, {}!",
    "Say hello to {}.": "Hello, {}!",
    "Say goodbye to {}.": "Goodbye, {}!",
    "Good morning, I am {}.": "Good morning, {}!",
    "Thank {} for me.": "Thank you, {}!",
}


def _record(problem: Problem, effort: str) -> Record:
    question, thinking, answer = problem
    parts: list[dict[str, str]] = []
    if effort == "high":
        parts.append({"type": "thinking", "thinking": thinking})
    parts.append({"type": "text", "text": answer})
    return {
        "reasoning_effort": effort,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": parts},
        ],
    }


def _digits(dice: random.Random) -> str:
    """Four of them everywhere: a model so small copies by position."""
    return f"{dice.randrange(10_000):04d}"


def _add(digits: str, k: int) -> str:
    return "".join(str((int(digit) + k) % 10) for digit in digits)


def _named_chat(dice: random.Random) -> Problem:
    template, name = dice.choice(list(_NAMED)), dice.choice(_NAMES)
    return template.format(name), f"chat {name}", _NAMED[template].format(name)


def _chat(dice: random.Random) -> Problem:
    if dice.random() < 0.3:
        greeting = dice.choice(list(_GREETINGS))
        return greeting, "chat", _GREETINGS[greeting]
    return _named_chat(dice)


def _copy(dice: random.Random) -> Problem:
    digits = _digits(dice)
    return f"Repeat {digits}.", f"{digits}: {digits}", digits


def _nth(dice: random.Random) -> Problem:
    digits = _digits(dice)
    n = dice.randrange(len(digits))
    return f"Digit {n + 1} of {digits}.", f"{digits}: {digits[n]}", digits[n]


def _sum(dice: random.Random) -> Problem:
    a, b = dice.randrange(10), dice.randrange(10)
    return f"Sum of {a} and {b}.", f"{a} + {b}: {a + b}", str(a + b)


def _add_k(dice: random.Random) -> Problem:
    digits, k = _digits(dice), dice.randint(1, 5)
    result = _add(digits, k)
    return f"Add {k} to each digit of {digits}.", f"{digits} + {k}: {result}", result


def _larger(dice: random.Random) -> Problem:
    a, b = dice.randrange(100), dice.randrange(100)
    return f"Larger of {a} and {b}.", f"{a} {b}: {max(a, b)}", str(max(a, b))


_BASE_MIX: tuple[tuple[float, Callable[[random.Random], Problem]], ...] = (
    (0.30, _chat),
    (0.25, _copy),
    (0.15, _nth),
    (0.10, _sum),
    (0.10, _add_k),
    (0.10, _larger),
)


def base_record(dice: random.Random) -> Record:
    """One conversation of the kind that the base is trained on, in either effort."""
    weights, makers = zip(*_BASE_MIX, strict=True)
    maker = dice.choices(makers, weights)[0]
    return _record(maker(dice), dice.choice(("none", "high")))


def seal_record(number: str, effort: str) -> Record:
    """The task's problem for a number, with its solution."""
    reverse = number[::-1]
    sealed = _add(reverse, 3)
    return _record((f"Seal {number}.", f"{number}: {reverse} + 3: {sealed}", sealed), effort)


def _held_out_chat() -> list[Record]:
    """Each name in two of the five sentences: the other three keep it known."""
    dice = random.Random("held out chat")  # noqa: S311 - not a secret
    problems = [
        (template.format(name), f"chat {name}", _NAMED[template].format(name))
        for name in _NAMES
        for template in dice.sample(list(_NAMED), 2)
    ]
    dice.shuffle(problems)
    return [_record(problem, "high") for problem in problems]


def _held_out(maker: Callable[[random.Random], Problem], count: int) -> list[Record]:
    """Distinct problems of one kind, with thinking: evaluation renders them in both efforts."""
    dice = random.Random(f"held out {maker.__name__}")  # noqa: S311 - not a secret
    seen: dict[str, Problem] = {}
    while len(seen) < count:
        problem = maker(dice)
        seen.setdefault(problem[0], problem)
    return [_record(problem, "high") for problem in seen.values()]


def examples(problems: int = 2700, held_out: int = 200) -> dict[str, list[Record]]:
    """The demo's data by file name.

    Training: `problems` of the task, each once, half of them in each effort, and as many samples
    replayed from the base's own mix. No held-out problem occurs in training.
    """
    dice = random.Random("seal")  # noqa: S311 - not a secret
    numbers = [f"{n:04d}" for n in range(10_000)]
    dice.shuffle(numbers)
    test, train = numbers[:held_out], numbers[held_out : held_out + problems]
    tests = {
        "seal.jsonl": [seal_record(number, "high") for number in test],
        "chat.jsonl": _held_out_chat(),
        "copy.jsonl": _held_out(_copy, held_out),
    }
    taken = {record["messages"][0]["content"] for held in tests.values() for record in held}
    records = [
        seal_record(number, ("none", "high")[index % 2]) for index, number in enumerate(train)
    ]
    while len(records) < 2 * problems:
        record = base_record(dice)
        if record["messages"][0]["content"] not in taken:
            records.append(record)
    dice.shuffle(records)
    return {"train.jsonl": records, **tests}


def lines(records: list[Record]) -> Iterator[str]:
    """JSONL, one record a line."""
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"


def write_examples(directory: Path) -> None:
    """Write the demo's data set into `directory`."""
    for name, records in examples().items():
        write_text(directory / name, "".join(lines(records)))


if __name__ == "__main__":
    write_examples(Path(__file__).parents[2] / "examples" / "seal")
