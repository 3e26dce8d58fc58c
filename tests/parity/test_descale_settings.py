"""`ms4 descale` of sources whose settings lie about sizes, are of the wrong kind, or are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ms4.weights import layouts
from tests.descaling import refused
from tests.kill_points import Result, ms4
from tests.small_source import write


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {layout: write(root / layout, layout) for layout in ("hf", "native")}


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def descale(where: Path, source: Path) -> Result:
    return ms4(where, "descale", source, "base", "--to", "nf4")


def nested(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    keys = path.split(".")
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = new
    return value


SIZES: dict[str, tuple[str, str, Any, str]] = {
    "a layer more": ("hf", "text_config.num_hidden_layers", 3, "missing (language_model.model"),
    "a layer less": ("hf", "text_config.num_hidden_layers", 1, "unexpected (language_model.model"),
    "no layers": ("hf", "text_config.num_hidden_layers", 0, "the size `layers` is 0"),
    "negative": ("hf", "text_config.num_hidden_layers", -1, "the size `layers` is -1"),
    "many": ("hf", "text_config.num_hidden_layers", 1000, "missing (language_model.model"),
    "too many": ("hf", "text_config.num_hidden_layers", 10**9, "the size `layers` is"),
    "digits": ("hf", "text_config.num_hidden_layers", 10**4000, "the size `layers` is"),
    "text": ("hf", "text_config.num_hidden_layers", "2", "the size `layers` is '2'"),
    "a fraction": ("hf", "text_config.num_hidden_layers", 2.0, "the size `layers` is 2.0"),
    "a list": ("hf", "text_config.num_hidden_layers", [2], "the size `layers` is [2]"),
    "other experts": ("hf", "text_config.n_routed_experts", 5, "not BF16 [5"),
    "ten million experts": ("hf", "text_config.n_routed_experts", 10**7, "[10000000"),
    "another width": ("hf", "text_config.hidden_size", 65, "not BF16 [256, 65]"),
    "another vision head": ("hf", "vision_config.head_dim", 7, "which are no pairs to rotate"),
    "another model": ("hf", "text_config.model_type", "llama", "not a Mistral Small 4"),
    "no text": ("hf", "text_config", 7, "must be mappings"),
    "native: a layer more": ("native", "n_layers", 3, "missing (layers.2."),
    "native: no layers": ("native", "n_layers", 0, "n_layers is 0"),
    "native: negative": ("native", "n_layers", -2, "n_layers is -2"),
    "native: too many": ("native", "n_layers", 10**6, "`layers` is 1000000"),
    "native: a billion tensors": ("native", "moe.num_experts", 10**7, "180000000 tensors"),
    "native: no experts": ("native", "moe", None, "moe.num_experts is None"),
    "native: dense layers": ("native", "moe.first_k_dense_replace", 1, "all layers are MoE"),
    "native: no heads": ("native", "vision_encoder.num_attention_heads", 0, "heads is 0"),
    "rotary settings": ("hf", "text_config.rope_parameters", 7, "rope_parameters is 7"),
    "a factor": ("hf", "text_config.rope_parameters.factor", "x", "factor is 'x'"),
    "no number": ("hf", "text_config.rope_parameters.factor", float("nan"), "factor is nan"),
    "a negative one": ("hf", "text_config.rope_parameters.mscale_all_dim", -1, "dim is -1"),
    "native: yarn": ("native", "yarn", 7, "yarn is 7"),
    "native: a factor": ("native", "yarn", {"factor": "much"}, "factor is 'much'"),
    "native: a base": ("native", "rope_theta", [1], "rope_theta is [1]"),
    "native: of vision": ("native", "vision_encoder.rope_theta", True, "rope_theta is True"),
    "native: scaling": ("native", "llama_4_scaling", "x", "llama_4_scaling is 'x'"),
}


@pytest.mark.parametrize("case", SIZES)
def test_settings_that_lie(
    where: Path, sources: dict[str, Path], tmp_path: Path, case: str
) -> None:
    layout, key, value, message = SIZES[case]
    source = shutil.copytree(sources[layout], tmp_path / "spoilt")
    path = source / layouts.SETTINGS[layout]  # type: ignore[index]
    path.write_text(json.dumps(nested(json.loads(path.read_text()), key, value)))
    assert refused(descale(where, source), str(source), message)
    assert not (where / "base").exists()


def test_native_heads_that_are_no_pairs(
    where: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Shapes alone do not tell: sixteen heads of one element have those of two of eight."""
    source = shutil.copytree(sources["native"], tmp_path / "spoilt")
    params = json.loads((source / "params.json").read_text())
    params["vision_encoder"] |= {"num_attention_heads": 16, "head_dim": 1}
    (source / "params.json").write_text(json.dumps(params))
    assert refused(descale(where, source), "params.json", "no pairs to rotate")


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", "[" * 100_000, "\xff", '{"model_type": {}}'])
@pytest.mark.parametrize("layout", ["hf", "native"])
def test_settings_that_are_none(
    where: Path, sources: dict[str, Path], tmp_path: Path, layout: str, text: str
) -> None:
    source = shutil.copytree(sources[layout], tmp_path / "spoilt")
    path = source / layouts.SETTINGS[layout]  # type: ignore[index]
    path.write_bytes(text.encode("latin-1"))
    assert refused(descale(where, source), str(path))


@pytest.mark.parametrize("change", [shutil.rmtree, lambda path: (path / "config.json").unlink()])
def test_no_source(
    where: Path, sources: dict[str, Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    source = shutil.copytree(sources["hf"], tmp_path / "spoilt")
    change(source)
    assert refused(descale(where, source), str(source))
    assert not (where / "base").exists()


def test_a_source_whose_name_is_too_long(where: Path) -> None:
    assert refused(descale(where, where / ("x" * 300)), "cannot be read (File name too long)")
