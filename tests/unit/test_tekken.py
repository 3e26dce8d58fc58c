"""The offline tokenizer file: the model's special ids, any text, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ms4.data.tekken import write_tekken
from ms4.errors import Ms4Error
from tests.examples import examples

SIZES = (131072, 4096)

SPECIAL_IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[AVAILABLE_TOOLS]": 5,
    "[/AVAILABLE_TOOLS]": 6,
    "[TOOL_RESULTS]": 7,
    "[/TOOL_RESULTS]": 8,
    "[TOOL_CALLS]": 9,
    "[IMG]": 10,
    "<pad>": 11,
    "[IMG_BREAK]": 12,
    "[IMG_END]": 13,
    "[SYSTEM_PROMPT]": 17,
    "[/SYSTEM_PROMPT]": 18,
    "[ARGS]": 32,
    "[CALL_ID]": 33,
    "[THINK]": 34,
    "[/THINK]": 35,
    "[MODEL_SETTINGS]": 36,
    "[/MODEL_SETTINGS]": 37,
    "<SPECIAL_38>": 38,
    "<SPECIAL_999>": 999,
}


@pytest.fixture(scope="module")
def files(small_tekken: Path, whole_tekken: Path) -> dict[int, Path]:
    return {4096: small_tekken, 131072: whole_tekken}


@pytest.fixture(scope="module")
def tokenizers(files: dict[int, Path]) -> dict[int, Tekkenizer]:
    return {size: Tekkenizer.from_file(path) for size, path in files.items()}


@pytest.mark.parametrize("size", SIZES)
def test_special_tokens_have_the_models_ids(size: int, tokenizers: dict[int, Tekkenizer]) -> None:
    tokenizer = tokenizers[size]
    assert {name: tokenizer.get_special_token(name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert tokenizer.num_special_tokens == 1000
    assert tokenizer.n_words == size
    assert tokenizer.version.value == "v15"
    assert tokenizer.image is not None
    assert (tokenizer.image.image_patch_size, tokenizer.image.max_image_size) == (14, 1540)
    assert tokenizer.image.spatial_merge_size == 2


@pytest.mark.parametrize("size", SIZES)
def test_text_goes_there_and_back(size: int, tokenizers: dict[int, Tekkenizer]) -> None:
    tokenizer = tokenizers[size]

    @settings(deadline=None, max_examples=examples(50))
    @given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert all(1000 <= token < size for token in ids)
        assert tokenizer.decode(ids) == text

    check()


def test_the_full_size_cuts_words_as_mistral_common_does(
    tokenizers: dict[int, Tekkenizer],
) -> None:
    shipped = MistralTokenizer.v3(is_tekken=True).instruct_tokenizer.tokenizer
    text = "Der Zug fährt um 18:45 ab. def f(x): return x ** 2\n\n한국어 😀"
    ours = tokenizers[131072].encode(text, bos=False, eos=False)
    assert ours == shipped.encode(text, bos=False, eos=False)


def test_a_conversation_opens_with_the_settings(files: dict[int, Path]) -> None:
    tokenizer = MistralTokenizer.from_file(str(files[4096]))
    request = ChatCompletionRequest(messages=[UserMessage(content="hi")])
    ids = tokenizer.encode_chat_completion(request).tokens
    assert ids[:2] == [1, 36]
    assert ids[-1] == 4
    text = tokenizer.decode([token for token in ids if token >= 1000])
    assert text == '{"reasoning_effort": "none"}hi'


def test_same_size_same_bytes(tmp_path: Path, files: dict[int, Path]) -> None:
    write_tekken(tmp_path / "tekken.json", 4096)
    assert (tmp_path / "tekken.json").read_bytes() == files[4096].read_bytes()


@pytest.mark.parametrize("size", [1255, 151_001])
def test_an_impossible_size_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(Ms4Error, match=rf"a vocabulary of {size} tokens.*choose 1256 to 151000"):
        write_tekken(tmp_path / "tekken.json", size)
    assert list(tmp_path.iterdir()) == []
