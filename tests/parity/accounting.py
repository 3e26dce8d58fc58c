"""The memory of one training step of the full-size model, counted without the memory.

The real training code runs on the meta device: every operation gives tensors of the right shape and
dtype and computes nothing. A dispatch mode sees each storage come, a weak reference sees it go.
The way of CUDA is taken: BF16, variable-length attention by the shapes of torch's own kernel, whole
slices of experts in memory that is held. The sizes that depend on numbers are those of the worst
case: each row is one document, every position is trained, all experts have rows and those of one
slice as many as go at once.

Not seen: what a kernel takes and gives back inside one call, and what the allocator loses.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Mistral3Config, Mistral4Config

from ms4 import memory, spec
from ms4.config import RunConfig
from ms4.model import attention, checkpointing, lora, stores
from ms4.model.build import EMBEDDING, empty_model
from ms4.model.frozen import FP8Linear
from ms4.model.module import Batch, PackedLoss
from ms4.train import optim
from ms4.weights import nf4

META = torch.device("meta")


@dataclass
class Event:
    """A storage came (bytes > 0) or went (bytes < 0)."""

    bytes: int
    label: tuple[str, str, str]
    """Phase in which it came, place in the source, and operation with shape."""
    phase: str
    """The phase now."""


@dataclass
class Accountant(TorchDispatchMode):
    """Counts the bytes of all storages that live."""

    phase: str = "load"
    events: list[Event] = field(default_factory=list)
    live: int = 0
    peak: int = 0
    """The most since `restart`."""
    _known: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0  # the gradients' norm
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]  # offloaded to the host, which is not counted
        if func is torch.ops.bitsandbytes.dequantize_4bit.out:
            return None  # its shape check takes a list for another shape; it allocates nothing
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf, func)
        return result

    def see(self, tensor: torch.Tensor, func: object = "parameter") -> None:
        """Count a tensor's storage, if it is new and on the meta device."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        label = (self.phase, _place(), f"{func} {tuple(tensor.shape)} {tensor.dtype}")

        def gone(_: object) -> None:
            del self._known[key]
            self._count(-size, label)

        self._known[key] = weakref.ref(storage, gone)
        self._count(size, label)

    def _count(self, size: int, label: tuple[str, str, str]) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)
        self.events.append(Event(size, label, self.phase))

    def restart(self, phase: str) -> None:
        """A new phase: the peak is counted from here."""
        self.phase, self.peak = phase, self.live

    def at_peak(self) -> Counter[tuple[str, str, str]]:
        """What lived at the fullest moment of all, by label."""
        live = most = at = 0
        for index, event in enumerate(self.events):
            live += event.bytes
            if live > most:
                most, at = live, index
        count: Counter[tuple[str, str, str]] = Counter()
        for event in self.events[: at + 1]:
            count[event.label] += event.bytes
        return +count


def _place() -> str:
    """The innermost line of ours or of transformers that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/ms4/" in name or "/models/mistral" in name:
            return f"{name.rsplit('/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


@dataclass(frozen=True)
class Account:
    """Bytes of one training step in its steady state: the optimizer has its moments."""

    weights: int
    adapters: int
    peaks: dict[str, int]
    """The most that lived in each part of the step."""

    def extrapolate(self, other: Account, layers: tuple[int, int], wanted: int) -> Account:
        """From accounts of models of two numbers of layers to one of `wanted`: each part of a step
        grows by the same with each layer."""
        few, many = layers

        def grown(a: int, b: int) -> int:
            return a + (b - a) * (wanted - few) // (many - few)

        return Account(
            grown(self.weights, other.weights),
            grown(self.adapters, other.adapters),
            {part: grown(self.peaks[part], other.peaks[part]) for part in self.peaks},
        )

    @property
    def peak(self) -> int:
        """The most of all."""
        return max(self.peaks.values())


Routing = Callable[[int, int], list[int]]
"""Rows and number of experts → where each expert's rows end."""


def worst(rows: int, experts: int) -> list[int]:
    """The routing that takes the most memory."""
    crowded = memory.EXPERT_SLICE
    most = rows * memory.SLICE_SHARES * crowded // experts
    few = [most + (rows - most) * (e + 1) // (experts - crowded) for e in range(experts - crowded)]
    return [most * (e + 1) // crowded for e in range(crowded)] + few


def build(config: RunConfig, dims: spec.Dimensions, routing: Routing = worst) -> Any:
    """The model with its adapters on the meta device, as the training stage makes it on CUDA."""
    text = Mistral4Config(num_hidden_layers=dims.layers).to_dict()
    text |= {"softmax_scale": dims.head**-0.5, "tie_word_embeddings": False}
    whole = Mistral3Config(text_config=text, tie_word_embeddings=False).to_dict()
    dense = config.model.dense_on("cuda")
    model = empty_model(whole, dims, config.model.experts, META, torch.bfloat16, dense)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, stores.ExpertStore | FP8Linear):
                setattr(module, name, nn.Parameter(parameter.to(torch.bfloat16)))
    model.model.language_model.set_attn_implementation(attention.VARIABLE_LENGTH)
    routed = config.train.micro_batch * config.data.sequence_length * dims.experts_per_token
    ends = routing(routed, dims.experts)
    for module in model.modules():
        if isinstance(getattr(module, "workspace", None), stores.Workspace):
            module.workspace.read = lambda offsets_E: ends
    model.requires_grad_(False)
    lora.add_adapters(model, config.adapters, dims)
    checkpointing.apply(model, config.train.checkpointing, config.train.offload_activations)
    return model.to(META).train()


def full_batch(rows: int, length: int) -> Batch:
    """Rows of one document each; what is trained is every position."""
    filled = torch.full((rows, length), 5)
    positions = torch.arange(length).expand(rows, -1)
    return Batch.of(filled, positions, filled)


def account(
    config: RunConfig, dims: spec.Dimensions, routing: Routing = worst
) -> tuple[Account, Accountant]:
    """Run one step of training and count."""
    rows, length = config.train.micro_batch, config.data.sequence_length
    nf4._tables(META)  # they stay, and are no part of a step
    model = build(config, dims, routing)
    parameters = lora.trainable(model)
    counted = Accountant()
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if name not in parameters and name != EMBEDDING:  # that is in host memory
            counted.see(parameter, "weight")
    weights = counted.live
    for parameter in parameters.values():
        counted.see(parameter, "adapter")
    adapters = counted.live - weights
    peaks: dict[str, int] = {}

    def enter(phase: str) -> None:
        peaks[counted.phase] = counted.peak
        counted.restart(phase)

    layers = model.model.language_model.layers
    for number, layer in ((0, layers[0]), (dims.layers - 1, layers[-1])):
        phase = "backward, first layer" if number == 0 else "backward, last layer"
        layer.register_full_backward_pre_hook(lambda *_, phase=phase: enter(phase))
    optimizer = optim.make(config.train, parameters.values())
    module, batch = PackedLoss(model, config.train.loss_chunk), full_batch(rows, length).to(META)
    with counted:
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if config.train.accumulation == 1:
            optimizer.zero_grad()  # else those of the micro-steps before are there
        counted.restart("forward")
        loss = module(batch)
        enter("backward")
        loss.backward()
        del loss
        enter("optimizer")
        optim.clip_gradients(parameters.values(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        enter("end")
    peaks.pop("load", None)
    return Account(weights, adapters, peaks), counted


def full_size(
    config: RunConfig, routing: Routing = worst, layers: tuple[int, int] = (2, 3)
) -> Account:
    """The account of the published model, from two of few layers."""
    dims = spec.Dimensions()
    few, many = (account(config, replace(dims, layers=n), routing)[0] for n in layers)
    return few.extrapolate(many, layers, dims.layers)
