"""Optimizers: their steps against the formula, their state, and resume against a straight run."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ms4 import spec
from ms4.config import AdaptersSection, RunSection, TrainSection
from ms4.errors import Ms4Error
from ms4.model import checkpointing, lora
from ms4.model.build import load_model, prepare_torch
from ms4.train import optim, state
from ms4.train.batches import collate, loss_sum

from .conftest import documents, relative

RUN = "a hash"
PAGED = pytest.param("paged_adamw_8bit", "bf16", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    torch.use_deterministic_algorithms(False)


def skip_paged_on_the_cpu(kind, device):
    if kind == "paged_adamw_8bit" and device.type == "cpu":
        pytest.skip("refused there, see below")


class Training:
    """The core of the loop: the tiny model with dropout, a batch that follows from the step."""

    def __init__(self, bases, device, kind, dtype):
        prepare_torch(RunSection(threads=1), 0)
        compute = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.device = device
        self.model = load_model(bases["nf4"] / "weights/base", "nf4", device, compute)
        settings = AdaptersSection(targets=("all",), rank=40, dropout=0.2, dtype=dtype)
        lora.add_adapters(self.model, settings, spec.TINY)
        checkpointing.apply(self.model.train(), "full", False)
        self.parameters = lora.trainable(self.model)
        train = TrainSection(optimizer=kind, learning_rate=1e-2, weight_decay=0.01)
        self.optimizer = optim.make(train, self.parameters.values())
        self.progress = state.restore(self.parameters, self.optimizer, RUN)

    def steps(self, until):
        losses = []
        while self.progress.step < until:
            batch = collate([documents([40, 20], self.progress.step)]).to(self.device)
            for group in self.optimizer.param_groups:
                group["lr"] = 1e-2 / (self.progress.step + 1)
            loss = loss_sum(self.model, batch, 64)
            loss.backward()
            optim.clip_gradients(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            losses.append(float(loss.detach()))
        return losses

    def save(self):
        state.save(self.progress, self.parameters, self.optimizer, RUN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("adamw", "fp32"), ("adamw", "bf16"), ("adamw_8bit", "fp32"), PAGED]
)
def test_resume_is_the_straight_run_bit_for_bit(bases, tmp_path, monkeypatch, device, kind, dtype):
    skip_paged_on_the_cpu(kind, device)
    monkeypatch.chdir(tmp_path)
    straight = Training(bases, device, kind, dtype)
    losses = straight.steps(5)
    straight.save()
    Path("checkpoints/step-000005").rename("straight")

    first = Training(bases, device, kind, dtype)
    assert first.steps(2) == losses[:2]
    first.save()
    again = Training(bases, device, kind, dtype)
    assert again.progress.step == 2
    assert again.steps(5) == losses[2:]
    again.save()

    one, other = (
        load_file("straight/state.safetensors"),
        load_file("checkpoints/step-000005/state.safetensors"),
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = {name.split("/")[1] for name in one if name.startswith("optimizer/")}
    assert kinds == EXPECTED[kind if dtype == "fp32" or kind != "adamw" else "fp32 moments"]
    moments = [v for n, v in one.items() if n.startswith(("optimizer/state", "optimizer/exp"))]
    # bitsandbytes keeps the moments of less than 4096 parameters in FP32.
    narrow = {v.dtype for v in moments if v.numel() >= 4096}
    assert narrow == ({torch.float32} if kind == "adamw" else {torch.uint8})


EIGHT_BITS = {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
EXPECTED = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "fp32 moments": {"step", "state1", "state2"},
    "adamw_8bit": EIGHT_BITS,
    "paged_adamw_8bit": EIGHT_BITS,
}


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer_is_not_taken_up_silently(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cpu = torch.device("cpu")
    training = Training(bases, cpu, "adamw", "bf16")
    training.steps(1)
    training.save()
    with pytest.raises(Ms4Error, match="of another optimizer"):
        Training(bases, cpu, "adamw_8bit", "bf16")


def by_formula(start, gradients, rate, decay):
    """AdamW in FP64, step for step."""
    value, m, v = start.double(), 0.0, 0.0
    for step, g in enumerate(gradients, start=1):
        m = 0.9 * m + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        value = value * (1 - rate * decay)
        value = value - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return value


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("adamw", torch.float32, 1e-5),
        # The update: 8-bit moments are off by some percent, BF16 parameters by their rounding.
        ("adamw_8bit", torch.float32, 0.05),
        ("adamw", torch.bfloat16, 0.05),
    ],
)
def test_steps_against_the_formula(device, kind, dtype, error):
    torch.manual_seed(0)
    start = (torch.randn(64, 128) / 100).to(dtype)
    parameter = torch.nn.Parameter(start.clone().to(device))
    gradients = [torch.randn(64, 128).to(dtype) for _ in range(20)]
    optimizer = optim.make(
        TrainSection(optimizer=kind, learning_rate=0.01, weight_decay=0.1), [parameter]
    )
    for gradient in gradients:
        parameter.grad = gradient.to(device)
        optimizer.step()
    wanted = by_formula(start, gradients, 0.01, 0.1)
    found = parameter.detach().cpu().double()
    assert relative(found - start.double(), wanted - start.double()) < error


@pytest.mark.slow
def test_bf16_moments_would_stop(device):
    """Why BF16 adapters do not get torch's AdamW: its second moment never decays."""
    parameter = torch.nn.Parameter(torch.ones(8192, dtype=torch.bfloat16, device=device))
    theirs = torch.optim.AdamW([parameter], lr=0.0)
    ours = optim.make(TrainSection(), [parameter])
    for step in range(200):
        parameter.grad = torch.full_like(parameter, 1.0 if step == 0 else 0.0)
        theirs.step()
        ours.step()
    wanted = 0.001 * 0.999**199
    assert float(theirs.state[parameter]["exp_avg_sq"][0]) > 1.1 * wanted
    assert float(ours.state[parameter]["state2"][0]) == pytest.approx(wanted, rel=1e-4)


def test_adamw_is_fused(device):
    parameter = torch.nn.Parameter(torch.zeros(4, device=device))
    assert optim.make(TrainSection(), [parameter]).param_groups[0]["fused"]


def test_what_a_cpu_cannot_do_is_refused():
    """bitsandbytes would go on unpaged, with a warning."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(Ms4Error, match=r"train\.optimizer: `paged_adamw_8bit` pages GPU memory"):
        optim.make(TrainSection(optimizer="paged_adamw_8bit"), [parameter])
    with pytest.raises(Ms4Error, match=r"train\.offload_activations: on a CPU"):
        optim.check_device(TrainSection(offload_activations=True), torch.device("cpu"))


def test_clipping(device):
    parameters = [torch.nn.Parameter(torch.zeros(n, device=device)) for n in (3, 4)]
    unused = torch.nn.Parameter(torch.zeros(2, device=device))
    for parameter, dtype in zip(parameters, (torch.float32, torch.float32), strict=True):
        parameter.grad = torch.full_like(parameter, 2.0, dtype=dtype)
    norm = optim.clip_gradients([*parameters, unused], 1.0)
    assert norm == pytest.approx(math.sqrt(7 * 4))
    assert optim.clip_gradients(parameters, 2.0) == pytest.approx(1.0)
    assert float(parameters[0].grad[0]) == pytest.approx(2 / norm)
    parameters[1].grad[0] = torch.inf
    before = parameters[0].grad.clone()
    assert optim.clip_gradients(parameters, 1.0) == math.inf
    assert torch.equal(parameters[0].grad, before)


@pytest.mark.slow
def test_accumulation_of_four_batches_is_one_batch_of_four(bases, device):
    """A token weighs the same in whatever batch it is, however many targets the batch has."""
    training = Training(bases, device, "adamw", "fp32")
    training.model.eval()  # no dropout: its masks would differ
    with torch.no_grad():
        for parameter in training.parameters.values():
            parameter.add_(torch.randn(parameter.shape, device=device) * 0.02)
    rows = [documents([50, 10], 0), documents([7], 1), documents([30, 30], 2), documents([21], 3)]
    results = []
    for size in (1, 4):
        batches = [collate(rows[at : at + size]).to(device) for at in range(0, 4, size)]
        trained = sum(batch.trained for batch in batches)
        loss = 0.0
        for batch in batches:
            part = loss_sum(training.model, batch, 64) / trained
            part.backward()
            loss += part.item()
        results.append((loss, [p.grad for p in training.parameters.values()]))
        for parameter in training.parameters.values():
            parameter.grad = None
    (one, ones), (four, fours) = results
    limit = 1e-5 if device.type == "cpu" else 2e-2
    assert one == pytest.approx(four, rel=limit)
    assert all(relative(a, b) < limit for a, b in zip(ones, fours, strict=True))
