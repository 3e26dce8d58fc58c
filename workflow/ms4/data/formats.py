"""How people write conversations → OpenAI's form, which `conversation.py` checks.

| format | a record |
|---|---|
| messages | `messages` (or `conversations`) of `role` and `content` |
| sharegpt | `conversations` of `from` and `value`, with `system` and `tools` beside them |
| alpaca | `instruction`, `input`, `output`, with `system` and `history` |
| prompt_completion | `prompt` and `completion` (or `response`), each text or a list of messages |
| question_answer | `question` and `answer` (or `response`) |
| text | `text`, trained whole: continued pre-training |

A record of one turn may have `thinking` (or `reasoning_content`, `reasoning`) and `system`; all may
have `reasoning_effort`, `tools` and `images` (or one `image`). What data calls otherwise is renamed
first (`data.fields`, `data.roles`): there is no further format for that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ms4.config_data import DataSection, FieldName, Format
from ms4.data.conversation import THINKING, WEIGHTS, Conversation, parse_record
from ms4.data.faults import SampleFault
from ms4.data.format_names import FORMATS, NAMES, format_of
from ms4.data.image_places import with_images
from ms4.data.json_text import kind_of, list_of, parse_json, short
from ms4.data.turn_keys import unused_in_turns

Record = dict[str, Any]

_LISTS = ("conversations", "conversation", "messages")
_COMMON = {"reasoning_effort", "tools", "images", "image"}
_USED: dict[Format, set[str]] = {
    "messages": {"system", *_COMMON},
    "sharegpt": {"system", *_COMMON},
    "alpaca": {"instruction", "input", "system", "history", *THINKING, *_COMMON},
    "prompt_completion": {"prompt", "system", *THINKING, *_COMMON},
    "question_answer": {"question", "system", *THINKING, *_COMMON},
    "text": {"text"},
}
"""Keys of a record that its format reads, beside the one of several that it takes."""
_ANSWERS: dict[Format, tuple[str, ...]] = {
    "alpaca": ("output", "response"),
    "prompt_completion": ("completion", "response"),
    "question_answer": ("answer", "response"),
}
"""Keys of an answer; the first that a record has is read."""

_MESSAGE_FIELDS: dict[FieldName, str] = {
    "role": "role",
    "content": "content",
    "thinking": "reasoning_content",
    "tool_calls": "tool_calls",
    "tool_call_id": "tool_call_id",
    "name": "name",
    "weight": "weight",
}
"""Field of a message → OpenAI's name for it."""
_RECORD_FIELDS: dict[FieldName, str] = {
    "messages": "messages",
    "system": "system",
    "prompt": "prompt",
    "completion": "completion",
    "history": "history",
    "thinking": "thinking",
    "tools": "tools",
    "effort": "reasoning_effort",
    "text": "text",
    "images": "images",
}
"""Field of a record → what the formats call it."""

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    "function_call": "function_call",
    **dict.fromkeys(("observation", "tool", "function_response"), "observation"),
}


@dataclass(frozen=True)
class Reading:
    """How the records of one file are read."""

    format: Format
    fields: dict[FieldName, str]
    roles: dict[str, str]

    @classmethod
    def of(cls, format: Format, data: DataSection) -> Reading:
        """With the names that the configuration gives."""
        return cls(format, dict(data.fields), dict(data.roles))


def detect(records: Iterable[object], data: DataSection) -> Format:
    """The format that most of these records have; `messages` if none is known.

    Args:
        records: the first ones of a file, parsed.
        data: its `format`, if it declares one, is the answer.
    """
    if data.format != "auto":
        return data.format
    votes: Counter[Format] = Counter()
    for record in records:
        if isinstance(record, dict):
            try:
                found = format_of(_renamed(record, Reading.of("auto", data)))
            except SampleFault:
                continue
            if found is not None:
                votes[found] += 1
    return max(FORMATS, key=lambda name: votes[name]) if votes else "messages"


def to_conversation(record: object, reading: Reading) -> Conversation:
    """The conversation of a record.

    Raises:
        SampleFault: what is wrong first, and what to do.
    """
    if not isinstance(record, dict):
        return parse_record(record)  # which says what it is
    record = _renamed(record, reading)
    try:
        return _conversation(record, reading.format)
    except SampleFault as fault:
        other = format_of(record)
        if other in (None, reading.format):
            raise
        raise SampleFault(
            f"{fault}; it is written as {NAMES[other]}: give each format a file of its own, or "
            "correct data.format"
        ) from fault


def _conversation(record: Record, format: Format) -> Conversation:
    if format == "text":
        return _plain(record)
    convert = {
        "messages": _messages,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
        "prompt_completion": _prompt_completion,
        "question_answer": _question_answer,
    }[format]
    converted = convert(record)
    for key in ("reasoning_effort", "tools", "functions"):
        if record.get(key) is not None and key not in converted:
            converted[key] = record[key]
    given = [key for key in ("images", "image") if record.get(key)]
    if len(given) > 1:
        raise SampleFault("`images` and `image` beside each other; keep one of them")
    if given:
        converted["messages"] = with_images(converted["messages"], record[given[0]])
    return parse_record(converted)


def unused_keys(record: object, reading: Reading) -> set[str]:
    """Keys of a record that nothing is made of."""
    if not isinstance(record, dict):
        return set()
    used = set(_USED[reading.format])
    lists: tuple[str, ...] = ()
    if reading.format in _ANSWERS:
        answer = _either(record, *_ANSWERS[reading.format])[0]
        used.add(answer)
        lists = ("prompt", answer)
    elif reading.format != "text":
        lists = (_list_of(record, reading.format),)
        used.update(lists)
    for field, column in reading.fields.items():
        used.discard(_RECORD_FIELDS.get(field, ""))  # what is mapped stands in its place
        used.add(column.split(".")[0])
    unused = {key for key, value in record.items() if key not in used and value not in (None, "")}
    for name in lists:
        column = reading.fields.get("messages", name) if len(lists) == 1 else name
        turns = _look_up(record, column)[1]
        turns = list_of(turns) if len(lists) == 1 else turns
        if isinstance(turns, list):
            inside = unused_in_turns(turns, dict(reading.fields), reading.roles)
            unused |= {f"{column}.{key}" for key in inside}
    return unused


def _list_of(record: Record, format: Format) -> str:
    """The key of a record's turns; the format's own if it has none."""
    if format == "sharegpt":
        return next((key for key in _LISTS if key in record), "conversations")
    found = (key for key in _LISTS[:2] if isinstance(record.get(key), (list, str)))
    return "messages" if "messages" in record else next(found, "messages")


def in_its_names(fault: str, reading: Reading) -> str:
    """What is said of a record, with the names that it has, by ShareGPT or `data.fields`."""
    if reading.format == "sharegpt":
        fault = fault.replace("`content`", "`value`")
    for field, column in reading.fields.items():
        for names in (_RECORD_FIELDS, _MESSAGE_FIELDS):
            if field in names:
                fault = fault.replace(f"`{names[field]}`", f"`{column}`")
    return fault


def mapped_fields(record: object, reading: Reading) -> set[FieldName]:
    """Which of `data.fields` a record has. One that no record of a file has is misspelled."""
    if not isinstance(record, dict):
        return set()
    names = (reading.fields.get("messages", "messages"), *_LISTS)
    lists = (list_of(_look_up(record, name)[1]) for name in names)
    turns: list[Any] = next((turns for turns in lists if turns is not None), [])
    seen: set[FieldName] = set()
    for field, column in reading.fields.items():
        in_turns = any(isinstance(turn, dict) and column in turn for turn in turns)
        if in_turns or (field in _RECORD_FIELDS and _look_up(record, column)[0]):
            seen.add(field)
    return seen


def _look_up(record: Record, column: str) -> tuple[bool, Any]:
    """Whether a record has a column, and its value; `a.b` is `b` of the object `a`."""
    if column in record:
        return True, record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            return False, None
        value = value[name]
    return True, value


def _renamed(record: Record, reading: Reading) -> Record:
    if not reading.fields and not reading.roles:
        return record
    result = dict(record)
    for field, column in reading.fields.items():
        name = _RECORD_FIELDS.get(field)
        if name is None:
            continue
        found, value = _look_up(record, column)
        if found:
            result.pop(column, None)
            result[name] = value
    key = next((key for key in ("messages", *_LISTS[:2]) if key in result), None)
    if key is None:
        return result
    turns = result[key]
    if isinstance(turns, str):  # tables hold them as text
        turns = _parsed(turns, key)
    if isinstance(turns, list) and (reading.roles or reading.fields.keys() & _MESSAGE_FIELDS):
        del result[key]
        # With roles and contents by other names they are OpenAI's messages now.
        key = "messages" if reading.fields.keys() & {"role", "content"} else key
        result[key] = [_renamed_message(turn, reading) for turn in turns]
    return result


def _renamed_message(turn: object, reading: Reading) -> object:
    if not isinstance(turn, dict):
        return turn
    result = dict(turn)
    for field, column in reading.fields.items():
        name = _MESSAGE_FIELDS.get(field)
        if name is not None and column in turn:
            result.pop(column, None)
            result[name] = turn[column]
    for key in ("role", "from"):
        role = result.get(key)
        if isinstance(role, str) and role in reading.roles:
            result[key] = reading.roles[role]
    return result


def _plain(record: Record) -> Conversation:
    text = record.get("text")
    if not isinstance(text, str):
        raise SampleFault(f"`text` {_is(record, 'text')}; it must be text{_keys(record)}")
    if not text.strip():
        raise SampleFault("`text` is empty; remove the record")
    return Conversation(messages=(), plain=text)


def _is(record: Record, name: str) -> str:
    return f"is {kind_of(record[name])}" if name in record else "is missing"


def _keys(record: Record) -> str:
    return f" (the record's keys: {', '.join(f'`{key}`' for key in list(record)[:6]) or 'none'})"


def _messages(record: Record) -> Record:
    name = _list_of(record, "messages")
    if name not in record:
        parse_record(record)  # which says what it lacks
    messages = record[name]
    if isinstance(messages, str):  # tables hold them as text
        messages = _parsed(messages, name)
    return {**record, "messages": _with_system(messages, record.get("system"))}


def _with_system(messages: Any, system: object) -> Any:
    """The messages, after what stands beside them as the system's."""
    if system in (None, "") or not isinstance(messages, list):
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise SampleFault("a `system` beside a first turn of the system; keep one of them")
    return [{"role": "system", "content": system}, *messages]


def _parsed(text: str, name: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return parse_json(text)
    except SampleFault as fault:
        raise SampleFault(f"`{name}`: {fault}") from fault


# ShareGPT.


def _sharegpt(record: Record) -> Record:
    name = _list_of(record, "sharegpt")
    turns = record.get(name)
    if isinstance(turns, str):
        turns = _parsed(turns, name)
    if not isinstance(turns, list):
        raise SampleFault(f"`{name}` {_is(record, name)}; it must be a list{_keys(record)}")
    if not turns:
        raise SampleFault(f"`{name}` is empty; remove the record")
    messages: list[Record] = []
    calls: list[str] = []
    for index, turn in enumerate(turns, 1):
        made = _sharegpt_turn(turn, f"turn {index}", calls, len(messages))
        if messages and made[0].keys() == messages[-1].keys() == {"role", "tool_calls"}:
            messages[-1]["tool_calls"] += made[0]["tool_calls"]  # calls in a row are one turn's
        else:
            messages += made
    result: Record = {"messages": _with_system(messages, record.get("system"))}
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if isinstance(tools, list):  # bare functions, as LLaMA-Factory has them
        tools = [
            {"type": "function", "function": tool}
            if isinstance(tool, dict) and "name" in tool and "function" not in tool
            else tool
            for tool in tools
        ]
    if tools is not None:
        result["tools"] = tools
    return result


def _sharegpt_turn(turn: object, where: str, calls: list[str], number: int) -> list[Record]:
    if not isinstance(turn, dict):
        raise SampleFault(f"{where} is {kind_of(turn)}; it must be an object of `from` and `value`")
    role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn.get("from"), str) else None
    if role is None:
        known = ", ".join(f"`{name}`" for name in _SHAREGPT_ROLES)
        raise SampleFault(
            f"{where}: `from` is {short(turn['from'])}; use {known}, or name it in data.roles"
            if "from" in turn
            else f"{where}: no `from`; use {known}"
        )
    if "value" not in turn:
        raise SampleFault(f"{where}: no `value`; add what was said")
    value = turn["value"]
    kept = {key: turn[key] for key in (*WEIGHTS, *THINKING) if key in turn}
    if role == "function_call":
        functions = _parsed(value, f"{where}: function_call") if isinstance(value, str) else value
        functions = functions if isinstance(functions, list) else [functions]
        if not functions or not all(isinstance(f, dict) and "name" in f for f in functions):
            raise SampleFault(
                f'{where}: a function_call is not JSON of {{"name": ..., "arguments": ...}}; '
                "correct it"
            )
        names = [f"{number:06d}{len(calls) + at:03d}" for at in range(len(functions))]
        calls += names
        tool_calls = [
            {"id": name, "type": "function", "function": function}
            for name, function in zip(names, functions, strict=True)
        ]
        return [{"role": "assistant", "tool_calls": tool_calls, **kept}]
    if role == "observation":
        if not calls:
            raise SampleFault(f"{where}: an observation without a function_call before; add it")
        results = [value]
        if len(calls) > 1:  # one observation may answer all calls, as a list
            parsed = _parsed(value, f"{where}: observation") if isinstance(value, str) else value
            if isinstance(parsed, list) and len(parsed) == len(calls):
                results = [
                    part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
                    for part in parsed
                ]
        answered, calls[:] = calls[: len(results)], calls[len(results) :]
        return [
            {"role": "tool", "tool_call_id": name, "content": result}
            for name, result in zip(answered, results, strict=True)
        ]
    calls.clear()
    return [{"role": role, "content": value, **kept}]


# Records of one turn.


def _one_turn(record: Record, question: Any, answer: Any, *names: str) -> Record:
    """Messages of a question and its answer, with `system` and thinking beside them."""
    for name, value in zip(names, (question, answer), strict=True):
        if not isinstance(value, str):
            what = f"is {kind_of(value)}" if value is not None else _is(record, name)
            raise SampleFault(f"`{name}` {what}; it must be text{_keys(record)}")
    if not answer.strip():
        raise SampleFault(f"`{names[1]}` is empty, so nothing to learn; fill it, or remove it")
    if not question.strip():
        raise SampleFault(f"`{names[0]}` is empty; fill it, or remove the record")
    says: Record = {"role": "assistant", "content": answer}
    given = [name for name in THINKING if record.get(name) not in (None, "")]
    if len(given) > 1:
        raise SampleFault(f"{' and '.join(f'`{n}`' for n in given)} beside each other; keep one")
    for name in (*given, *(["system"] if record.get("system") not in (None, "") else [])):
        if not isinstance(record[name], str):
            raise SampleFault(f"`{name}` is {kind_of(record[name])}; it must be text")
    if given:
        says["reasoning_content"] = record[given[0]]
    messages = [{"role": "user", "content": question}, says]
    if record.get("system") not in (None, ""):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return {"messages": messages}


def _either(record: Record, *names: str) -> tuple[str, Any]:
    """The first of these that a record has, and its value."""
    name = next((name for name in names if record.get(name) is not None), names[0])
    return name, record.get(name)


def _alpaca(record: Record) -> Record:
    name, output = _either(record, "output", "response")
    instruction, extra = record.get("instruction"), record.get("input")
    if not isinstance(extra, (str, type(None))):
        raise SampleFault(f"`input` is {kind_of(extra)}; it must be text")
    if isinstance(instruction, str) and extra and extra.strip():
        instruction = f"{instruction}\n{extra}" if instruction.strip() else extra
    converted = _one_turn(record, instruction, output, "instruction", name)
    history = record.get("history") or []
    if isinstance(history, str):
        history = _parsed(history, "history")
    turns: list[Record] = []
    for pair in history if isinstance(history, list) else [history]:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
        ):
            raise SampleFault("`history` is not a list of pairs of texts; correct it")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    converted["messages"][-2:-2] = turns
    return converted


def _prompt_completion(record: Record) -> Record:
    name, completion = _either(record, "completion", "response")
    prompt = record.get("prompt")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _one_turn(record, prompt, completion, "prompt", name)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}]
    after = after if isinstance(completion, str) else completion
    if not isinstance(before, list) or not isinstance(after, list):
        raise SampleFault(
            f"`prompt` {_is(record, 'prompt')} and `{name}` {_is(record, name)}; each must be text "
            "or a list of messages"
        )
    # What stands in the prompt is shown and not trained.
    before = [
        {**turn, "weight": 0}
        if isinstance(turn, dict) and turn.get("role") == "assistant"
        else turn
        for turn in before
    ]
    return {"messages": [*before, *after]}


def _question_answer(record: Record) -> Record:
    name, answer = _either(record, "answer", "response")
    return _one_turn(record, record.get("question"), answer, "question", name)
