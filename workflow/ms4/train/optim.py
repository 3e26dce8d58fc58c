"""Optimizers: AdamW with FP32 moments or bitsandbytes' 8-bit ones, and their state as tensors.

torch's own AdamW keeps the moments in the dtype of the parameter. In BF16 that stops the second
moment: multiplied by 0.999 it rounds to what it was. So BF16 adapters get bitsandbytes' 32-bit
AdamW, whose moments are FP32 whatever the parameter is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bitsandbytes.optim import AdamW as FP32MomentsAdamW
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn

from ms4.config import TrainSection, cpu_faults
from ms4.errors import Ms4Error

FUSED = ("cuda", "cpu")
"""Devices for which torch has a fused AdamW: one pass over memory, no temporaries."""


def check_device(train: TrainSection, device: torch.device) -> None:
    """Refuse what the device cannot do: `run.device: auto` is known only here.

    Raises:
        Ms4Error: names the fields.
    """
    if device.type == "cpu" and (faults := cpu_faults(train)):
        raise Ms4Error("\n".join(faults))


def make(train: TrainSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimizer over parameters of one dtype and device.

    Args:
        train: the configuration.
        parameters: what is trained.

    Raises:
        Ms4Error: the device cannot do it.
    """
    chosen = list(parameters)
    device, dtype = chosen[0].device, chosen[0].dtype
    check_device(train, device)
    settings: dict[str, Any] = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    made: torch.optim.Optimizer
    if train.optimizer == "adamw_8bit":
        made = AdamW8bit(chosen, **settings)
    elif train.optimizer == "paged_adamw_8bit":
        made = PagedAdamW8bit(chosen, **settings)
    elif dtype != torch.float32:
        made = FP32MomentsAdamW(chosen, **settings)
    else:
        made = torch.optim.AdamW(chosen, **settings, fused=device.type in FUSED or None)
    return made


def read_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, torch.Tensor]:
    """A parameter's state by name, each a tensor of its own: moments, maps, scales and step."""
    state = {}
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, torch.Tensor):
            state[key] = torch.tensor(value)  # bitsandbytes counts steps in an int
        elif key.startswith("qmap"):
            state[key] = value.clone()  # one tensor for all parameters, which no file may hold
        else:
            state[key] = value
    return state


def write_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, torch.Tensor]
) -> None:
    """Give a parameter the state that `read_state` read, bit for bit.

    Raises:
        Ms4Error: it is of another optimizer.
    """
    if isinstance(optimizer, Optimizer8bit):
        # Its own buffers are filled: paged ones are no ordinary memory.
        group = optimizer.param_groups[0]
        index = next(i for i, p in enumerate(group["params"]) if p is parameter)
        optimizer.init_state(group, parameter, 0, index)
        if parameter.is_cuda:
            torch.cuda.synchronize()  # paged buffers are zeroed by a kernel, and filled by the host
        own = optimizer.state[parameter]
        if own.keys() != state.keys():
            raise Ms4Error(f"a checkpoint holds {', '.join(state)}: of another optimizer")
        for key, value in state.items():
            if isinstance(own[key], torch.Tensor):
                own[key].copy_(value)
            else:
                own[key] = int(value)
        return
    fused = optimizer.param_groups[0]["fused"]
    optimizer.state[parameter] = {
        # Without fusing, torch counts the steps on the host.
        key: value.to(parameter.device) if value.dim() or fused else value
        for key, value in state.items()
    }


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their global L2 norm is at most `limit`; returns the norm.

    The norm is computed in FP32, also that of BF16 gradients. If it is not finite, nothing is
    scaled.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm = float(torch.linalg.vector_norm(torch.stack(norms)))
    if limit < norm < math.inf:
        for gradient in gradients:
            gradient.mul_(limit / norm)
    return norm
