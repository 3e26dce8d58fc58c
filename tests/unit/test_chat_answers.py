"""What the model generates is taken apart; a file that is not the model's tokenizer is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ms4.config import Effort
from ms4.data.chat import Chat
from ms4.data.tekken import write_tekken
from ms4.errors import Ms4Error

CONTROLS = ["[INST]", "</s>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "<pad>"]


@pytest.fixture(scope="module")
def tokenizer(tekken: Path) -> Tekkenizer:
    return Tekkenizer.from_file(tekken)


def ids(tokenizer: Tekkenizer, text: str) -> list[int]:
    """Text with the names of control tokens → ids."""
    tokens: list[int] = []
    while text:
        name = next((name for name in CONTROLS if text.startswith(name)), None)
        if name is not None:
            tokens.append(tokenizer.get_special_token(name))
            text = text[len(name) :]
            continue
        end = min((text.find(n) for n in CONTROLS if n in text), default=len(text))
        tokens += tokenizer.encode(text[:end], bos=False, eos=False)
        text = text[end:]
    return tokens


GENERATED: list[tuple[Effort, str, str | None, str, bool]] = [
    ("none", "Four.</s>", None, "Four.", True),
    ("none", " Four.\n</s>", None, "Four.", True),
    ("none", "Four.", None, "Four.", False),
    ("none", "Four.</s><pad><pad>", None, "Four.", True),
    ("none", "Four.</s>[INST]five</s>", None, "Four.", True),
    ("none", "</s>", None, "", False),
    ("none", "", None, "", False),
    ("none", "[THINK]2+2[/THINK]4</s>", "2+2", "4", False),
    ("none", "2+2[/THINK]4</s>", None, "2+24", False),
    ("none", "4[INST]</s>", None, "4", False),
    (
        "none",
        '[TOOL_CALLS]f[ARGS]{"a": 1}</s>',
        None,
        '[TOOL_CALLS]f[ARGS]{"a": 1}',
        True,
    ),
    ("high", "[THINK]2+2[/THINK]4</s>", "2+2", "4", True),
    ("high", "[THINK] 2+2\n[/THINK]\n4 </s>", " 2+2\n", "4", True),
    ("high", "[THINK][/THINK]4</s>", "", "4", True),
    ("high", "[THINK]a[/THINK][TOOL_CALLS]f[ARGS]{}</s>", "a", "[TOOL_CALLS]f[ARGS]{}", True),
    ("high", "4</s>", None, "4", False),
    ("high", "[THINK]2+2[/THINK]4", "2+2", "4", False),
    ("high", "[THINK]2+2", "2+2", "", False),
    ("high", "[THINK]2+2</s>", "2+2", "", False),
    ("high", "[THINK]2+2[/THINK]</s>", "2+2", "", False),
    ("high", "well [THINK]2+2[/THINK]4</s>", "2+2", "well 4", False),
    ("high", "[THINK]a[THINK]b[/THINK]4</s>", "ab", "4", False),
    ("high", "[THINK]a[/THINK][THINK]b[/THINK]4</s>", "a", "b4", False),
    ("high", "[THINK]a[/THINK]4[/THINK]</s>", "a", "4", False),
    ("high", "[/THINK][THINK]a[/THINK]4</s>", "a", "4", False),
    ("high", "[THINK]a[TOOL_CALLS]f[/THINK]4</s>", "af", "4", False),
    ("high", "[/THINK]a[THINK]b</s>", "b", "a", False),
]


@pytest.mark.parametrize(("effort", "text", "thinking", "answer", "well_formed"), GENERATED)
def test_a_generated_turn_is_taken_apart(
    effort: Effort,
    text: str,
    thinking: str | None,
    answer: str,
    well_formed: bool,
    chat: Chat,
    tokenizer: Tekkenizer,
) -> None:
    assert chat.decode_answer(ids(tokenizer, text), effort) == (thinking, answer, well_formed)


# Tokenizer files.


def test_ids_that_others_need(chat: Chat) -> None:
    assert (chat.bos, chat.eos, chat.pad, chat.think, chat.end_think) == (1, 2, 11, 34, 35)
    assert chat.vocabulary == 4096


def test_a_damaged_tokenizer_file(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    path.write_text('{"config": ')
    with pytest.raises(Ms4Error, match=r"tekken.json: cannot be loaded as a tokenizer"):
        Chat(path)
    path.write_text("{}")
    with pytest.raises(Ms4Error, match=r"tekken.json: cannot be loaded as a tokenizer"):
        Chat(path)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(Ms4Error, match=r"tokenizer.json: not a tokenizer file"):
        Chat(path)


@pytest.mark.parametrize("change", ["version", "builder"])
def test_a_tokenizer_without_reasoning_efforts(tmp_path: Path, change: str) -> None:
    path = tmp_path / "tekken.json"
    write_tekken(path, 1256)
    tekken = json.loads(path.read_text())
    if change == "version":
        tekken["config"]["version"] = "v13"
        del tekken["model_settings_builder"]
    else:
        tekken["model_settings_builder"] = {}
    path.write_text(json.dumps(tekken))
    version = "v13" if change == "version" else "v15"
    with pytest.raises(Ms4Error, match=f"of version {version} without reasoning efforts"):
        Chat(path)
