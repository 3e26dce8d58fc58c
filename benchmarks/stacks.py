"""Two ways to fine-tune one model of random weights: ms4's, and a plain one of common libraries.

The plain stack is transformers' model, its experts bitsandbytes-parametrized and multiplied by
`grouped_mm`, PEFT's adapters (experts as `target_parameters`) and transformers' cross-entropy. Both
hold the very same tensors, so that neither pays for the other's; what one of them holds in another
form is made when it is built.

Packed weights are random codes, made where they stay: what a step costs does not depend on what the
weights say, but the experts must be asked for evenly, as random routers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.utils.parametrize as parametrize
from accelerate import init_empty_weights
from bitsandbytes.nn import parametrize as bnb_parametrize
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.config import AdaptersSection, Dense, TrainSection
from ms4.model import checkpointing, lora, stores
from ms4.model.build import empty_model
from ms4.model.frozen import FP8Linear, HostEmbedding
from ms4.model.module import IGNORED, Batch, PackedLoss
from ms4.train import optim
from ms4.weights import configs, fp8, nf4

STD = 0.02
"""Of the weights: what large models are initialized with."""


def base_config(dims: spec.Dimensions) -> dict[str, Any]:
    """config.json of a base of these sizes."""
    return configs.base_config(configs.hf_config(dims), dims, "plain")


State = dict[str, torch.Tensor]
"""A model's weights by their names in ms4's model."""


def random_weights(
    dims: spec.Dimensions, device: torch.device, dtype: torch.dtype, dense: Dense
) -> State:
    """Weights as loading an NF4 base gives them, but random.

    Args:
        dims: the sizes.
        device: where they are made and stay, but for what ms4 holds on the host.
        dtype: of the computation.
        dense: how the dense layers are held.
    """
    torch.manual_seed(0)
    model = empty_model(base_config(dims), dims, "nf4", device, dtype, dense)
    state: State = {}
    for name, parameter in model.named_parameters():
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        packed = isinstance(module, stores.ExpertStore | FP8Linear)
        kind = parameter.dtype if packed else dtype
        made = torch.empty(parameter.shape, dtype=kind, device=device)
        if isinstance(module, stores.ExpertStore):
            _fill_packed(made, own)
        elif own == "codes":
            made.copy_((torch.randn(made.shape, device=device) * 100).to(fp8.FP8).view(torch.uint8))
        elif own == "scale_inv":
            made.fill_(STD / 100)
        elif name.endswith("norm.weight"):
            made.fill_(1)
        else:
            made.normal_(std=STD)
        state[name] = made.cpu() if isinstance(module, HostEmbedding) else made
    return state


def packed_model(
    state: State, dims: spec.Dimensions, device: torch.device, dtype: torch.dtype, dense: Dense
) -> Any:
    """ms4's model over `random_weights`."""
    model = empty_model(base_config(dims), dims, "nf4", device, dtype, dense)
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    return model.to(device).eval()


def _fill_packed(made: torch.Tensor, name: str) -> None:
    """Random NF4: codes of any value, blocks of magnitudes near that of 64 normal weights.

    One offset for all experts: ms4 keeps one for each, bitsandbytes one for a whole parameter, and
    both are to read the same tensors.
    """
    if made.dtype == torch.uint8:
        made.random_()
    elif name == nf4.SUFFIXES[2].removeprefix("."):
        made.fill_(STD / 4)
    else:
        made.fill_(2.4 * STD)


class HalvesOf4Bit(nn.Module):
    """bitsandbytes' parametrization in two calls: one counts in int32, and gate_up_proj of the
    published model has 2³¹ elements."""

    def __init__(self, state: bnb.QuantState) -> None:
        super().__init__()
        self.state = state

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """The dequantized weights; no third copy of a half."""
        whole, half = self.state, self.state.shape[0] // 2
        out = torch.empty(whole.shape, dtype=whole.dtype, device=packed.device)
        absmax = bnb.dequantize_blockwise(whole.absmax, whole.state2).add_(whole.offset)
        for codes, magnitudes, part in zip(
            packed.view(2, -1), absmax.view(2, -1), out.split(half), strict=True
        ):
            state = bnb.QuantState(
                absmax=magnitudes,
                shape=part.shape,
                code=whole.code,
                blocksize=nf4.BLOCK,
                quant_type="nf4",
                dtype=whole.dtype,
            )
            if packed.is_cuda:
                bnb.dequantize_4bit(codes.view(-1, 1), state, out=part)
            else:  # bitsandbytes' CPU kernel writes into memory of its own only
                part.copy_(bnb.dequantize_4bit(codes.view(-1, 1), state))
        return out


def plain_model(
    state: State,
    dims: spec.Dimensions,
    device: torch.device,
    dtype: torch.dtype,
    adapters: AdaptersSection | None = None,
) -> Any:
    """The plain stack's model over `random_weights`.

    PEFT comes first, over a model without memory: applied to experts that are parametrized already
    it finds no parameter of theirs, and says so in a warning only.

    Args:
        state: the weights; what ms4 holds as FP8 or on the host is made here in the way of this
            stack.
        dims: the sizes.
        device: that computes.
        dtype: of the computation.
        adapters: what is adapted, held in FP32 (PEFT's default) or BF16; None: nothing is.
    """
    settings = Mistral3Config(**base_config(dims))
    with init_empty_weights(include_buffers=False):
        model = Mistral3ForConditionalGeneration(settings)
    text: Any = model.model.language_model
    text.set_attn_implementation("sdpa")
    text.set_experts_implementation("grouped_mm")
    text.config.use_cache = False
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    peft = None if adapters is None else _adapted(model, adapters)
    for tensor in spec.tensors(dims):
        name, _, parameter = tensor.transformers.rpartition(".")
        if tensor.role == "experts":
            _parametrize(modules[name], parameter, tensor, state, dtype)
        else:
            weight = _unpacked(state, tensor, device, dtype)
            setattr(modules[name], parameter, nn.Parameter(weight, requires_grad=False))
    if adapters is None or peft is None:
        return model.to(device)
    for module in peft.modules():
        for name, factor in getattr(module, "lora_A", {}).items():
            kind = lora.DTYPES[adapters.dtype]
            A = _materialize(factor, device, kind).weight.data
            A.uniform_(-1, 1).mul_(factor.in_features**-0.5)
            _materialize(module.lora_B[name], device, kind).weight.data.zero_()
        if isinstance(module, ParamWrapper):
            module.register_forward_hook(_take_proxies_away, always_call=True)
    return peft.to(device)


def _unpacked(
    state: State, tensor: spec.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A weight in the dtype of the computation, where it computes."""
    held = state.get(tensor.transformers)
    if held is not None:
        return held.to(device, dtype)
    name = tensor.transformers.removesuffix("weight")
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
    return stores.decode_fp8(state[f"{name}codes"], state[f"{name}scale_inv"], out)


def _take_proxies_away(wrapper: Any, *_: Any) -> None:
    """PEFT 0.21.2 leaves what adds its product to a parameter that is parametrized already, with a
    warning, and raises at the second forward pass. It is taken away here, or this stack could not
    be measured at all with adapters on its experts."""
    ways = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
    del ways[1:]


def _adapted(model: Any, adapters: AdaptersSection) -> Any:
    """PEFT's adapters for the layers that ms4's presets name, without memory."""
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        target_modules=lora.dense_pattern(adapters.presets) or [],
        target_parameters=list(lora.EXPERTS) if "experts" in adapters.presets else None,
    )
    return get_peft_model(model, config, low_cpu_mem_usage=True)


def _materialize(factor: nn.Linear, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    """Memory for an adapter's factor."""
    empty = torch.empty(factor.weight.shape, dtype=dtype, device=device)
    factor.weight = nn.Parameter(empty)
    return factor


def _parametrize(
    module: nn.Module,
    parameter: str,
    tensor: spec.Tensor,
    state: State,
    dtype: torch.dtype,
) -> None:
    """What bitsandbytes' `replace_parameter_4bit` does, with weights that are packed already."""
    packed = nf4.Packed(*(state[tensor.transformers + suffix] for suffix in nf4.SUFFIXES))
    values, dynamic = nf4._tables(packed.codes.device)
    nested = bnb.QuantState(
        absmax=packed.scale.flatten(), blocksize=nf4.GROUP, code=dynamic, dtype=torch.float32
    )
    whole = bnb.QuantState(
        absmax=packed.absmax.flatten(),
        shape=torch.Size(tensor.shape),
        code=values,
        blocksize=nf4.BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=packed.offset[0],
        state2=nested,
    )
    codes = nn.Parameter(packed.codes.detach().view(-1, 1), requires_grad=False)
    setattr(module, parameter, codes)
    counted = math.prod(tensor.shape) < 2**31
    kind = bnb_parametrize.Bnb4bitParametrization if counted else HalvesOf4Bit
    parametrize.register_parametrization(module, parameter, kind(whole), unsafe=True)
    bnb_parametrize._register_parametrization_hooks(module, parameter)


@contextmanager
def deterministic() -> Iterator[None]:
    """As ms4's training stage has it; the plain stack's does not."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Ours:
    """ms4's training step of one document, as the training stage makes it."""

    def __init__(
        self, model: Any, dims: spec.Dimensions, adapters: AdaptersSection, train: TrainSection
    ) -> None:
        """Adapters, policy and optimizer for `packed_model`."""
        self.model = model
        lora.add_adapters(model, adapters, dims)
        checkpointing.apply(model.train(), train.checkpointing, train.offload_activations)
        self.parameters = lora.trainable(model)
        self.optimizer = optim.make(train, self.parameters.values())
        self.module = PackedLoss(model, train.loss_chunk)
        self.limit = train.max_grad_norm
        self.device = next(iter(self.parameters.values())).device

    def backward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> float:
        """Gradients of the mean loss over the labels that have a token before them; the loss."""
        positions = torch.arange(len(tokens))[None]
        wanted = tokens if labels is None else labels
        targets = torch.cat([wanted[1:], wanted.new_tensor([IGNORED])])[None]
        batch = Batch.of(tokens[None], positions, targets)
        with deterministic():
            loss = self.module(batch.to(self.device)) / batch.trained
            loss.backward()
            return float(loss.detach())

    def step(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> float:
        """Train on int64 [T] on the host, all of it or what has a label."""
        loss = self.backward(tokens, labels)
        optim.clip_gradients(self.parameters.values(), self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class Plain:
    """The same step of the plain stack, its loss transformers' own."""

    def __init__(self, model: Any, train: TrainSection) -> None:
        """Policy and optimizer for `plain_model`."""
        self.model = model.train()
        if train.checkpointing != "none":
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.make(train, self.parameters)
        self.limit = train.max_grad_norm
        self.device = self.parameters[0].device

    def backward(self, tokens: torch.Tensor) -> float:
        """Gradients; the loss."""
        rows = tokens[None].to(self.device)
        loss = self.model(input_ids=rows, labels=rows).loss
        loss.backward()
        return float(loss.detach())

    def step(self, tokens: torch.Tensor) -> float:
        """Train on int64 [T] on the host."""
        loss = self.backward(tokens)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def without_gradient(model: nn.Module) -> tuple[int, int]:
    """Of a model's trained tensors, how many got no gradient or only zeros; and how many there are.

    Beside B, which starts at zero, every A has a zero gradient in the first step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    dead = [p for p in trained if p.grad is None or not bool(p.grad.count_nonzero())]
    return len(dead), len(trained)
