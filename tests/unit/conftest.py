"""The tokenizers of the tiny model and of the real one's size, made once; what reads and encodes
with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ms4 import cli
from ms4.data.chat import Chat
from ms4.data.tekken import write_tekken


@pytest.fixture(scope="session")
def small_tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4,096 ids, alone in its directory; nobody writes to either."""
    path = tmp_path_factory.mktemp("small") / "tekken.json"
    write_tekken(path, 4096)
    return path


@pytest.fixture(scope="session")
def whole_tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of as many ids as the real model has; nobody writes to it."""
    path = tmp_path_factory.mktemp("whole") / "tekken.json"
    write_tekken(path)
    return path


@pytest.fixture(scope="module")
def tekken(small_tekken: Path) -> Path:
    """What `chat` and `mistral` read; a file that wants another one has its own."""
    return small_tekken


@pytest.fixture(scope="module")
def chat(tekken: Path) -> Chat:
    return Chat(tekken)


@pytest.fixture(scope="module")
def mistral(tekken: Path) -> MistralTokenizer:  # type: ignore[type-arg]
    """Encodes conversations that end in any turn."""
    return MistralTokenizer.from_file(tekken, mode=ValidationMode.agnostic)


@pytest.fixture
def data(tekken: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `ms4 data` with a small tokenizer; gives its code and what it printed."""

    def run(*arguments: str, tokenizer: Path = tekken) -> tuple[int, str, str]:
        code = cli.main(["data", "--tokenizer", str(tokenizer), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
