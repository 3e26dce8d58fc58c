"""docs/weights.md: its commands and its code, run as they stand on the tiny model; its figures."""

import re
import shlex

import pytest
import torch

from ms4 import cli, spec
from ms4.weights import layouts, tables
from ms4.weights.schedule import as_published
from ms4.weights.shards import table_bytes
from tests.commands import CHECKOUT

from . import by_hand

GUIDE = (CHECKOUT / "docs/weights.md").read_text(encoding="utf-8")
REPOSITORY = "mistralai/Mistral-Small-4-119B-2603"


def blocks(language):
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture(scope="module")
def ran(checkpoint, tmp_path_factory):
    """What the guide's code leaves: its variables, and the directory that it ran in.

    The hub stands for a directory here, and so `fetch` converts what lies there in its place.
    """
    root = tmp_path_factory.mktemp("guide")
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for path in checkpoint.iterdir():
            (root / "mistral-small-4").mkdir(exist_ok=True)
            (root / "mistral-small-4" / path.name).symlink_to(path)
        for line in "".join(blocks("sh")).splitlines():
            program, *arguments = shlex.split(line)
            assert program == "ms4"
            if "--revision" in arguments:
                at = arguments.index("--revision")
                del arguments[at : at + 2]
            given = [str(checkpoint) if a == REPOSITORY else a for a in arguments]
            assert cli.main(given) == 0, line
        for code in blocks("python"):
            exec(compile(code, "docs/weights.md", "exec"), names)  # noqa: S102 - our own document
    return names, root


@pytest.mark.slow
def test_the_commands_and_the_code_run(ran, checkpoint):
    names, root = ran
    weights = by_hand.bf16_weights(checkpoint)
    by_hand.assert_same_tensors(by_hand.stored(root / "mistral-small-4/bf16"), weights)
    by_hand.assert_same_tensors(
        by_hand.stored(root / "mistral-small-4-fp8"), by_hand.stored(checkpoint)
    )
    by_hand.assert_same_tensors(by_hand.bf16_weights(root / "mistral-small-4-native"), weights)
    for name in ("gate_up", "down"):
        exact = weights[f"language_model.model.layers.0.mlp.experts.{name}_proj"][5].double()
        assert names[name].shape == exact.shape
        assert 0.05 < (names[name].double() - exact).norm() / exact.norm() < 0.12
    assert names["logits"].shape == (1, len(names["tokens"]), spec.TINY.vocabulary)


def test_its_check_for_raw_codes_finds_them(checkpoint):
    (check,) = [code for code in blocks("python") if "largest" in code]
    model = torch.nn.Module()
    model.gate_up_proj = torch.nn.Parameter(
        by_hand.stored(checkpoint)["language_model.model.layers.0.mlp.experts.gate_up_proj"].float()
    )
    with pytest.raises(AssertionError, match="FP8 codes"):
        exec(check, {"model": model})  # noqa: S102


def test_its_figures_are_computed():
    dims = spec.Dimensions()
    published = spec.disk_tensors(dims)
    source = sum(
        table_bytes({name: published[name] for name in shard})
        for shard in spec.plan_shards(published)
    )
    row = {}
    for to in tables.STORAGES:
        made = sum(tables.piece_bytes(dims, to).values())
        row[to] = [
            source,
            made,
            as_published(dims, to, free=False).peak(),
            as_published(dims, to, free=True).peak(),
        ]
        assert f"| `{to}` | {made / 1e9:.1f} GB |" in GUIDE
    for number, line in enumerate(
        (
            "| FP8 source (HF layout; native 120.9 too) |",
            "| the copy |",
            "| both: `--convert` |",
            "| at most at a time with `--free-source` |",
        )
    ):
        assert " | ".join([line[:-2], *(f"{row[to][number] / 1e9:.1f}" for to in row)]) in GUIDE
    assert sum(row["bf16"][:2]) - row["bf16"][2] < 1e6
    native = layouts.expected(dims, "native")
    assert f"{table_bytes(native) / 1e9:.1f}" == "120.9"
    experts = [t for t in spec.tensors(dims) if t.role == "experts"]
    share = sum(t.numel for t in experts) / spec.PUBLISHED_PARAMETERS
    size = sum(2 * t.numel for t in experts) / 2**30
    assert f"{100 * share:.0f} % of the model, in BF16: {size:.0f} GiB" in GUIDE
    assert experts[0].numel == 2**31
