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
from ms4.config import AdaptersSection
from ms4.model import lora, stores
from ms4.model.build import empty_model
from ms4.weights import configs, nf4

STD = 0.02
"""Of the weights: what large models are initialized with."""


def base_config(dims: spec.Dimensions) -> dict[str, Any]:
    """config.json of a base of these sizes."""
    return configs.base_config(configs.hf_config(dims), dims, "plain")


def packed_model(
    dims: spec.Dimensions, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Any:
    """ms4's model, as loading an NF4 base gives it, but of random weights.

    Args:
        dims: its sizes.
        device: where the weights are made and stay.
        dtype: of the computation.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = empty_model(base_config(dims), dims, "nf4", device, dtype)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        packed = isinstance(model.get_submodule(module), stores.ExpertStore)
        kind = parameter.dtype if packed else dtype
        made = torch.empty(parameter.shape, dtype=kind, device=device)
        if packed:
            _fill_packed(made, own)
        elif name.endswith("norm.weight"):
            made.fill_(1)
        else:
            made.normal_(std=STD)
        state[name] = made
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
            bnb.dequantize_4bit(codes.view(-1, 1), state, out=part)
        return out


def plain_model(ours: Any, dims: spec.Dimensions, dtype: torch.dtype, adapters: Any = None) -> Any:
    """The plain stack's model over the tensors of `packed_model`'s.

    PEFT comes first, over a model without memory: applied to experts that are parametrized already
    it finds no parameter of theirs, and says so in a warning only.

    Args:
        ours: its adapters, if any, are not taken over.
        dims: its sizes.
        dtype: of the computation.
        adapters: an AdaptersSection; None for the bare model.
    """
    device = ours.lm_head.weight.device
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
    held = dict(ours.named_parameters())
    for tensor in spec.tensors(dims):
        name, _, parameter = tensor.transformers.rpartition(".")
        if tensor.role == "experts":
            _parametrize(modules[name], parameter, tensor, held, dtype)
        else:
            setattr(modules[name], parameter, held[tensor.transformers])
    if peft is None:
        return model.to(device)
    for module in peft.modules():
        for name, factor in getattr(module, "lora_A", {}).items():
            _materialize(factor, device).weight.data.uniform_(-1, 1).mul_(factor.in_features**-0.5)
            _materialize(module.lora_B[name], device).weight.data.zero_()
        if isinstance(module, ParamWrapper):
            module.register_forward_hook(_take_proxies_away, always_call=True)
    return peft.to(device)


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


def _materialize(factor: nn.Linear, device: torch.device) -> nn.Linear:
    """Memory for an adapter's factor, in FP32 as PEFT holds it."""
    empty = torch.empty(factor.weight.shape, dtype=torch.float32, device=device)
    factor.weight = nn.Parameter(empty)
    return factor


def _parametrize(
    module: nn.Module,
    parameter: str,
    tensor: spec.Tensor,
    held: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """What bitsandbytes' `replace_parameter_4bit` does, with weights that are packed already."""
    packed = nf4.Packed(*(held[tensor.transformers + suffix] for suffix in nf4.SUFFIXES))
    values, dynamic = nf4._tables(packed.codes.device)
    nested = bnb.QuantState(
        absmax=packed.scale.flatten(), blocksize=nf4.GROUP, code=dynamic, dtype=torch.float32
    )
    state = bnb.QuantState(
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
    whole = math.prod(tensor.shape) < 2**31
    way: nn.Module = bnb_parametrize.Bnb4bitParametrization(state) if whole else HalvesOf4Bit(state)
    parametrize.register_parametrization(module, parameter, way, unsafe=True)
    bnb_parametrize._register_parametrization_hooks(module, parameter)


def without_gradient(model: nn.Module) -> tuple[int, int]:
    """Of a model's trained tensors, how many got no gradient or only zeros; and how many there are.

    Beside B, which starts at zero, every A has a zero gradient in the first step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    dead = [p for p in trained if p.grad is None or not bool(p.grad.count_nonzero())]
    return len(dead), len(trained)
