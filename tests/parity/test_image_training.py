"""Documents with images in packed batches against transformers' own forward of each alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.data.chat import Chat
from ms4.data.image_store import ImageStore, ImageStoreWriter
from ms4.data.images import pixels
from ms4.data.packed import PackedData, TestSample
from ms4.data.packing import pack
from ms4.data.tekken import write_tekken
from ms4.errors import Ms4Error
from ms4.evaluate.generate import answer, mean_loss
from ms4.model import lora
from ms4.model.attention import packed
from ms4.model.build import load_model
from ms4.model.module import IGNORED, PackedLoss
from ms4.model.vision import image_outputs
from ms4.train.batches import Batches
from tests.chat_reference import conversation_of, image_part, png

from .conftest import relative
from .test_model import reference

CPU = torch.device("cpu")
MAX_SIZE = 112
RAWS = [png(*size, seed) for seed, size in enumerate([(40, 30), (28, 28), (90, 60), (300, 100)])]
SHOWN = [[0], [], [1, 2], [2, 0], [3]]
"""Images of each document."""


def record(number):
    parts = [image_part(RAWS[image]) for image in SHOWN[number]]
    parts.insert(len(parts) // 2, {"type": "text", "text": f"Question {number}: how many?"})
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": f"I count {number}."}]},
        ]
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Encoded documents, the packed data of them, and the store of their images."""
    directory = tmp_path_factory.mktemp("images")
    write_tekken(directory / "tekken.json", spec.TINY.vocabulary)
    chat = Chat(directory / "tekken.json", MAX_SIZE)
    encoded = [chat.encode(conversation_of(record(n)), "none") for n in range(len(SHOWN))]
    with ImageStoreWriter(directory / "images.safetensors", MAX_SIZE) as writer:
        for one in encoded:
            writer.add_document(one.images)
        writer.finish()
    lengths = np.array([len(one.tokens) for one in encoded], dtype=np.int64)
    data = PackedData(
        np.concatenate([one.tokens for one in encoded]),
        np.concatenate([one.trained for one in encoded]),
        np.concatenate([[0], np.cumsum(lengths)]),
        *pack(lengths, 128),
    )
    store = ImageStore(directory / "images.safetensors")
    assert len(store) == len(RAWS)
    assert 1 < data.bins < len(SHOWN)
    return encoded, data, store


@pytest.fixture
def ours(bases):
    return load_model(bases["bf16"] / "weights/base", "bf16", CPU, torch.float32)


def alone(model, one, images=None):
    """transformers' logits of one document, its images padded to one size."""
    tokens = torch.from_numpy(one.tokens.astype(np.int64))[None]
    shown = as_given(one.images if images is None else images)
    return model(input_ids=tokens, **shown).logits[0]


def as_given(images):
    """What transformers' forward takes of images."""
    if not images:
        return {}
    # What the store holds: mistral-common's pixels in BF16.
    arrays = [
        torch.from_numpy(pixels(image.raw, MAX_SIZE)).to(torch.bfloat16).float() for image in images
    ]
    sizes = torch.tensor([array.shape[1:] for array in arrays])
    height, width = sizes.max(dim=0).values.tolist()
    padded = torch.stack(
        [F.pad(a, (0, width - a.shape[2], 0, height - a.shape[1])) for a in arrays]
    )
    return {"pixel_values": padded, "image_sizes": sizes}


def packed_logits(model, batch):
    """Our logits of a batch, [B, T, vocabulary]."""
    hidden = model.model(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        use_cache=False,
        **image_outputs(model.model, batch.images, batch.shown),
        **packed(batch.starts_N, batch.longest),
    ).last_hidden_state
    return model.lm_head(hidden)


@torch.no_grad()
def test_packed_documents_are_what_transformers_makes_of_each(checkpoint, made, ours):
    encoded, data, store = made
    wanted_model = reference(checkpoint)
    reader = Batches(data, data.bins, 1, 0, images=store)
    (batch,) = reader.step(0)
    assert len(batch.images) == len(RAWS), "each once"
    assert len(batch.shown) == sum(map(len, SHOWN))
    found = packed_logits(ours, batch)
    order = reader._order.at(0, data.bins)
    total = torch.zeros((), dtype=torch.float64)
    for row, number in enumerate(order):
        at = 0
        for document in data.bin(number).tolist():
            one = encoded[document]
            size = len(one.tokens)
            wanted = alone(wanted_model, one)
            part = found[row, at : at + size]
            assert relative(part, wanted) < 1e-5
            assert (part - wanted).abs().max() < 1e-5 * wanted.abs().max()
            targets = torch.from_numpy(np.where(one.trained, one.tokens, IGNORED).astype(np.int64))
            total += F.cross_entropy(
                wanted[:-1], targets[1:], reduction="sum", ignore_index=IGNORED
            )
            at += size
    loss = PackedLoss(ours, 16)(batch)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert batch.trained == sum(int(one.trained.sum()) for one in encoded)


@torch.no_grad()
def test_another_image_is_seen(checkpoint, made):
    """The test above could not fail if the images did nothing."""
    encoded, _, _ = made
    model = reference(checkpoint)
    one = encoded[2]
    other = replace(one.images[0], raw=png(*one.images[0].size, 9))
    found = alone(model, one, [other, one.images[1]])
    assert relative(found, alone(model, one)) > 1e-4


@torch.no_grad()
def test_held_out_losses_and_answers_are_what_transformers_gives(checkpoint, made, ours):
    """Samples of a batch differ in how many images they show, and are padded."""
    encoded, _, store = made
    model = reference(checkpoint)
    samples, total, trained = [], 0.0, 0
    for number, one in enumerate(encoded):
        logits = alone(model, one)
        targets = torch.from_numpy(np.where(one.trained, one.tokens, IGNORED).astype(np.int64))
        total += F.cross_entropy(
            logits[:-1], targets[1:], reduction="sum", ignore_index=IGNORED
        ).item()
        trained += int(one.trained.sum())
        lists = (one.prompt.tolist(), one.tokens.tolist(), one.trained.tolist())
        samples.append(TestSample("t", number, "none", *lists, "", store.document(number)))
    loss, counted = mean_loss(ours, samples, store, 3, 16)
    assert counted == trained
    assert loss == pytest.approx(total / trained, rel=1e-5)
    seen = []
    with ours.lm_head.register_forward_hook(lambda *call: seen.append(call[-1])):
        answers = answer(ours, samples, store, 6)
    for number, one in enumerate(encoded):
        tokens = torch.from_numpy(one.prompt.astype(np.int64))[None]
        for step, written in enumerate(answers[number]):
            logits = model(input_ids=tokens, **as_given(one.images)).logits[0, -1]
            assert relative(seen[step][number, -1], logits) < 1e-5
            assert written == logits.argmax()
            tokens = torch.cat([tokens, torch.tensor([[written]])], 1)
        assert written == 2, "the end"


def test_adapters_learn_and_the_vision_tower_does_not(made, ours):
    _, data, store = made
    lora.add_adapters(ours, AdaptersSection(targets=("all",), rank=4), spec.TINY)
    ours.train()
    parameters = lora.trainable(ours)
    module = PackedLoss(ours, 16)
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    reader = Batches(data, 1, data.bins, 0, images=store)
    losses = []
    for step in range(4):
        batches = reader.step(step)
        trained = sum(batch.trained for batch in batches)
        total = 0.0
        for batch in batches:
            part = module(batch.to(CPU)) / trained
            part.backward()
            total += part.item()
        losses.append(total)
        frozen = [*ours.model.vision_tower.parameters()]
        frozen += ours.model.multi_modal_projector.parameters()
        assert frozen
        assert all(p.grad is None and not p.requires_grad for p in frozen)
        if step:
            assert all(p.grad is not None and p.grad.count_nonzero() for p in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_batches_without_images_call_no_vision_tower(made, ours):
    _, data, _ = made
    assert image_outputs(ours.model, (), ()) == {}
    ours.config.vision_feature_layer = -2
    with pytest.raises(Ms4Error, match="vision_feature_layer is -2; this model's is -1"):
        image_outputs(ours.model, (torch.zeros(3, 28, 28),), (0,))
    (batch,) = Batches(data, data.bins, 1, 0).step(0)
    assert batch.images == batch.shown == ()


def test_ranks_and_grouping(made):
    encoded, _, store = made
    lengths = np.array([len(one.tokens) for one in encoded], dtype=np.int64)
    data = PackedData(
        np.concatenate([one.tokens for one in encoded]),
        np.concatenate([one.trained for one in encoded]),
        np.concatenate([[0], np.cumsum(lengths)]),
        *pack(lengths, 128, "length_grouped"),
    )
    whole = Batches(data, 1, 4, 7, images=store).step(3)
    for rank in range(2):
        part = Batches(data, 1, 2, 7, images=store, rank=rank, ranks=2).step(3)
        assert len(part) == 2
        for batch, same in zip(part, whole[rank::2], strict=True):
            assert (batch.tokens_BT == same.tokens_BT).all()
            assert batch.shown == same.shown
            assert all((a == b).all() for a, b in zip(batch.images, same.images, strict=True))
    plain = Batches(data, 2, 10, 0, images=store).step(0)
    grouped = Batches(data, 2, 10, 0, images=store, grouped=True).step(0)

    def padding(batches):
        return sum(int((batch.tokens_BT == 11).sum()) for batch in batches)

    assert padding(grouped) < padding(plain)
