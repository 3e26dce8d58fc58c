"""What a run takes in time and energy, from published ceilings: estimates, and called so.

A micro-step passes the layers forward and backward, and once more forward where activations are
recomputed. Its time is the sum of

- dequantization: all routed experts are read packed and written in BF16, each pass;
- the experts' products: their arithmetic, or reading all BF16 experts if that takes longer;
- the other products and attention: their arithmetic;
- what is element by element: the layers' activations, written and read, each pass.

Letters as in `ms4.memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ms4 import memory, spec
from ms4.config import RunConfig
from ms4.device import GIB, GPUS, Gpu

ARITHMETIC = 0.5
"""Share of the published arithmetic that training reaches on matrices of these sizes."""
BANDWIDTH = 0.9
"""Share of the published bandwidth that copying kernels reach."""


@dataclass(frozen=True)
class Estimate:
    """The speed of a run on one GPU. Nothing of it is measured."""

    gpu: Gpu
    parts: dict[str, float]
    """Seconds of a micro-step by what takes them."""
    tokens: int
    """Tokens of a micro-step."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, padding included."""
        return self.tokens / sum(self.parts.values())

    def hours(self, tokens: int) -> float:
        """Hours for so many tokens, without loading, checkpoints and evaluation."""
        return tokens / self.tokens_per_s / 3600

    def kwh(self, tokens: int) -> float:
        """Energy for so many tokens at the GPU's full power; the host comes on top."""
        return self.hours(tokens) * self.gpu.watts / 1000


@dataclass(frozen=True)
class Work:
    """What a micro-step computes and moves."""

    passes: int
    """Passes through the routed experts: forward, backward, and again forward where activations
    are recomputed."""
    expert_flops: float
    dense_flops: float
    attention_flops: float
    packed_bytes: float
    """The routed experts as they are stored."""
    expert_bytes: float
    """The routed experts in BF16."""
    activation_bytes: float
    """What the layers write for one pass."""


def work(config: RunConfig, dims: spec.Dimensions) -> Work:
    """Count a micro-step of full bins, each one document.

    Products: 2 · T · N a pass, N the parameters that a token meets; backward of a frozen weight
    is one product, that for its input, of a trained one two. LoRA: 2 · T · P' · (1 + 2), P' what a
    token meets of it.
    Attention: T · S/2 keys · 2 · A · (D + value) a forward pass, backward 2.5 of them.
    Checkpointing `selective` spares the second forward pass of attention and of the dense products
    whose results it keeps (see `ms4.memory.layer_kept`).
    """
    counts = memory.parameters(dims)
    sequence = config.data.sequence_length
    tokens = config.train.micro_batch * sequence
    policy = config.train.checkpointing
    passes = 2 if policy == "none" else 3
    share = dims.experts_per_token / dims.experts
    routed = counts["experts"] * share
    dense = counts["attention"] + counts["shared"] + counts["router"]
    # The head makes logits, and gets a gradient for its input: never recomputed.
    head = 2 * counts["head"]
    trained = int(config.method == "full")
    adapters = 0.0
    for preset in config.adapters.presets if not trained else ():
        met = share if preset == "experts" else 1.0
        rank = config.adapters.rank_of(preset)
        adapters += memory.adapter_parameters(dims, preset, rank) * met
    spared = dims.layers * _kept_products(dims) if policy == "selective" else 0
    attended = 2.5 + (1 if policy in ("none", "selective") else 2)
    forward = dims.heads * (dims.head + dims.value) * sequence * dims.layers  # a token, causal
    products: float = dense * (passes + trained) - spared
    products += head * (1 + trained / 2) + adapters * (passes + 1)
    return Work(
        passes=passes,
        expert_flops=2 * tokens * routed * (passes + trained),
        dense_flops=2 * tokens * products,
        attention_flops=tokens * forward * attended,
        packed_bytes=memory.expert_bytes(dims, config.model.experts),
        expert_bytes=2 * counts["experts"],
        activation_bytes=dims.layers * memory.layer_saved(config, dims, tokens, 2),
    )


def _kept_products(dims: spec.Dimensions) -> int:
    """Weights of a layer's dense products that `selective` does not compute again: q_a, kv_a, o,
    the shared experts' gate and up, the router."""
    from_hidden = dims.q_rank + dims.kv_rank + dims.rope + dims.experts
    from_hidden += 2 * dims.expert_width * dims.shared_experts
    return dims.hidden * (from_hidden + dims.heads * dims.value)


def estimate(config: RunConfig, dims: spec.Dimensions, gpu: Gpu) -> Estimate:
    """Time of a micro-step on one GPU, if the run fits into it."""
    load = work(config, dims)
    flops, bandwidth = ARITHMETIC * gpu.teraflops * 1e12, BANDWIDTH * gpu.gigabytes_per_s * 1e9
    unpacked = 0.0 if config.model.experts == "bf16" else load.packed_bytes + load.expert_bytes
    parts = {
        "dequantize": load.passes * unpacked / bandwidth,
        "experts": max(load.expert_flops / flops, load.passes * load.expert_bytes / bandwidth),
        "dense layers and head": load.dense_flops / flops,
        "attention": load.attention_flops / flops,
        "element by element": 2 * load.passes * load.activation_bytes / bandwidth,
    }
    tokens = config.train.micro_batch * config.data.sequence_length
    return Estimate(gpu, parts, tokens)


def fits(gpu: Gpu, peak: int) -> bool:
    """Whether a run of this peak fits into the GPU's memory."""
    return peak <= gpu.gib * GIB


def table(config: RunConfig, dims: spec.Dimensions) -> list[Estimate]:
    """The estimate for each GPU of the table."""
    return [estimate(config, dims, gpu) for gpu in GPUS]


def arithmetic(found: Estimate) -> str:
    """The estimate's sum, written out."""
    terms = " + ".join(f"{1000 * s:.0f} ms {name}" for name, s in found.parts.items())
    total = sum(found.parts.values())
    return (
        f"{terms} = {1000 * total:.0f} ms for {found.tokens:,} tokens: "
        f"{math.floor(found.tokens_per_s):,} tokens/s"
    )
