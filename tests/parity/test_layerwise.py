"""The loss that is taken layer by layer from the files, against the whole model in memory."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4.model.build import load_model
from ms4.weights import texts
from ms4.weights.convert import descale_directory
from ms4.weights.layerwise import BaseWeights, SourceWeights, token_losses
from ms4.weights.layouts import Source
from ms4.weights.shards import Reader
from tests.commands import CHECKOUT, PEAK

from . import by_hand
from .test_model import reference

CPU = torch.device("cpu")
SCALES = ("plain", "yarn")
YARN = spec.TINY.softmax_scales({"factor": 128.0})["yarn"]


def whole(model, text):
    """Loss of each token that counts: the model in memory, each document by itself."""
    losses = []
    for number in range(text.documents[-1] + 1):
        own = text.documents == number
        tokens = torch.from_numpy(text.tokens[own])
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0].double()
        loss = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        losses.append(loss[torch.from_numpy(text.counted[own][1:])])
    return torch.cat(losses)


def of_base(directory, to, text, scales):
    config = read_json(directory / "config.json")
    with Reader() as reader:
        weights = BaseWeights(directory, spec.read_dimensions(directory), config, to, reader)
        return token_losses(weights, text, scales, "loss")


def of_source(directory, text, scales):
    with Source(directory) as source:
        return token_losses(SourceWeights(source), text, scales, "loss")


@pytest.fixture(scope="module")
def prose(checkpoint):
    return texts.ordinary(checkpoint / "tekken.json")


@pytest.fixture(scope="module")
def conversations(checkpoint):
    return texts.taught(checkpoint / "tekken.json")


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_the_loss_of_a_base_is_that_of_the_loaded_model(bases, kind, prose):
    base = bases[kind] / "weights/base"
    found = of_base(base, kind, prose, SCALES)
    assert found.shape == (2, len(prose.tokens) - 1)
    model = load_model(base, kind, CPU, torch.float32)
    for row, scale in zip(found, (32**-0.5, YARN), strict=True):
        model.config.text_config.softmax_scale = scale
        wanted = whole(model, prose)
        assert float((row - wanted).abs().max()) < 1e-3
        assert float(row.mean()) == pytest.approx(float(wanted.mean()), abs=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_documents_have_the_loss_that_they_have_alone(bases, conversations):
    base = bases["nf4"] / "weights/base"
    some = conversations.documents < 8
    text = texts.Text(
        "a few",
        conversations.tokens[some],
        conversations.documents[some],
        conversations.counted[some],
    )
    found = of_base(base, "nf4", text, ("plain",))
    wanted = whole(load_model(base, "nf4", CPU, torch.float32), text)
    assert found.shape == (1, int(text.counted.sum()))
    assert float((found[0] - wanted).abs().max()) < 1e-3


def test_the_loss_of_fp8_is_that_of_transformers(checkpoint, tmp_path, prose):
    """Source × scale and a base in FP8, against transformers' own model with weights decoded by
    bits, its softmax scale made by itself."""
    source = tmp_path / "s"
    source.symlink_to(checkpoint)
    base = by_hand.based(source, "fp8")
    wanted = [whole(reference(checkpoint, scale), prose) for scale in SCALES]
    for found in (of_source(checkpoint, prose, SCALES), of_base(base, "fp8", prose, SCALES)):
        for row, loss in zip(found, wanted, strict=True):
            assert float(row.mean()) == pytest.approx(float(loss.mean()), abs=1e-4)


def test_the_loss_of_a_native_source(checkpoint, tmp_path, prose):
    config = json.loads((checkpoint / "config.json").read_text())
    native = by_hand.native_checkpoint(tmp_path / "n", by_hand.bf16_weights(checkpoint), config)
    model = by_hand.model(by_hand.bf16_weights(native), config, torch.float32)
    found = of_source(native, prose, ("plain",))
    assert float(found.mean()) == pytest.approx(float(whole(model, prose).mean()), abs=1e-4)


def test_each_expert_that_is_used_is_read_once_for_both_scales(bases, prose):
    directory = bases["nf4"] / "weights/base"
    read = Counter()

    class Counting(BaseWeights):
        def part(self, tensor, start, count):
            read[tensor.disk, start] += 1
            return super().part(tensor, start, count)

    config = read_json(directory / "config.json")
    with Reader() as reader:
        weights = Counting(directory, spec.TINY, config, "nf4", reader)
        token_losses(weights, prose, SCALES, "loss")
    embedding = {key for key in read if "embed_tokens" in key[0]}
    assert len(embedding) == len(np.unique(prose.tokens))
    assert {read[key] for key in read.keys() - embedding} == {1}
    assert sum(".mlp.experts." in name for name, _ in read) <= 4 * 8 * 2


def test_a_softmax_scale_that_transformers_makes_otherwise_is_refused(bases, prose):
    """Where the settings say nothing of yarn, transformers has no second scale."""
    directory = bases["bf16"] / "weights/base"
    config = read_json(directory / "config.json")
    config["text_config"]["rope_parameters"]["rope_type"] = "default"
    with Reader() as reader:
        weights = BaseWeights(directory, spec.TINY, config, "bf16", reader)
        with pytest.raises(Ms4Error, match=r"transformers makes .* of the softmax scale `yarn`"):
            token_losses(weights, prose, SCALES, "loss")


def test_prose_is_one_document_and_every_token_but_the_first_counts(prose):
    assert prose.tokens[0] == 1  # <s>
    assert 300 < len(prose.tokens) < 1000
    assert prose.counted.tolist() == [False] + [True] * (len(prose.tokens) - 1)
    assert set(prose.documents.tolist()) == {0}
    assert prose.positions.tolist() == list(range(len(prose.tokens)))


def test_of_conversations_the_answers_count(conversations):
    assert set(np.diff(conversations.documents).tolist()) == {0, 1}
    starts = np.flatnonzero(conversations.positions == 0)
    assert (conversations.tokens[starts] == 1).all()
    assert len(starts) == texts.CONVERSATIONS
    assert not conversations.counted[starts].any()
    assert (conversations.tokens[conversations.counted] == 2).sum() == texts.CONVERSATIONS  # </s>


def test_a_tokenizer_of_another_model_is_refused(checkpoint, tmp_path):
    assert texts.choose(tmp_path, 4096, tiny=False) is None
    (tmp_path / "tekken.json").write_bytes((checkpoint / "tekken.json").read_bytes())
    assert texts.choose(tmp_path, 4096, tiny=False).name == "English prose"
    with pytest.raises(Ms4Error, match=r"tekken\.json: has the token .*ends at 2999"):
        texts.choose(tmp_path, 3000, tiny=False)


MEASURE = f"""{PEAK}
import json, sys
from pathlib import Path
import numpy as np
import torch
from ms4 import spec
from ms4.manifest import read_json
from ms4.weights.layerwise import BaseWeights, token_losses
from ms4.weights.shards import Reader
from ms4.weights.texts import Text

torch.set_num_threads(2)
tokens = np.random.default_rng(0).integers(0, 4096, 430)
text = Text("", tokens, np.zeros(430, np.int64), np.arange(430) > 0)
peaks = []
for base in map(Path, sys.argv[1:]):
    with Reader() as reader:
        dims, config = spec.read_dimensions(base), read_json(base / "config.json")
        weights = BaseWeights(base, dims, config, "nf4", reader)
        token_losses(weights, text, ("plain", "yarn"), "loss")
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_memory_is_that_of_a_layer_without_its_experts_and_of_a_few_experts(bases, tmp_path):
    """Two layers of the real width: their experts are 3.2 GB in fp32 and 1.6 GB in BF16; one expert
    is 0.1 GB in fp32, and the rest of a layer 0.2 GB."""
    sys.path.insert(0, str(CHECKOUT / "benchmarks"))
    try:
        import synthetic
    finally:
        sys.path.pop(0)
    synthetic.write_checkpoint(tmp_path / "source", synthetic.dimensions(2, experts=16))
    descale_directory(tmp_path / "source", tmp_path / "base", "nf4", "plain")
    command = [sys.executable, "-c", MEASURE, bases["nf4"] / "weights/base", tmp_path / "base"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert large - small < 0.8e9
