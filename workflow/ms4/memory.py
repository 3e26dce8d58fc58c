"""What a run takes in memory and on disk, from shapes alone.

Every estimate stands beside its formula, and tests hold it against an account of the real training
step, operation by operation, on the full-size model. Sizes are in bytes. The device's memory is at
its fullest in one of several moments: the loss, the backward pass of the last layer (all layers'
inputs are kept) or of the first (all gradients are there), the optimizer's step. What is held
throughout counts always, of the moments the largest.

Letters: T tokens of a micro-step, H hidden, L layers, E experts, K experts a token, I expert width,
S shared width, V vocabulary, A heads, D their dimensions, Q/R ranks, r LoRA rank, P adapter
parameters, b bytes of the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ms4 import spec
from ms4.config import Preset, RunConfig
from ms4.device import GIB, DeviceKind

COMPUTE_BYTES: Mapping[DeviceKind, int] = {"cuda": 2, "cpu": 4}
"""Bytes of the dtype that is computed in: BF16 on CUDA; on a CPU FP32, which is faster there."""
NF4_BLOCK = 64
"""Weights that share one absmax code, as `weights/base/` stores them."""
ABSMAX_BLOCK = 256
"""Absmax codes that share one FP32 scale."""
EXPERT_SLICE = 16
"""Experts that are dequantized at once on CUDA."""
SLICE_SHARES, SLICE_ROWS = 2, 1024
"""Rows that a slice takes at once, at most: so many times what even routing brings to it, and so
many anyway. More go in several turns, each of which dequantizes the slice again: at most half as
many turns more, and memory that is known whatever the router does."""
CPU_SLICE_BYTES = 4 << 20
"""The same on a CPU: what stays in its cache, but an expert at least."""
OPTIMIZER_BLOCK = 256
"""8-bit moments that share one FP32 scale."""
PROCESS_BYTES: Mapping[DeviceKind, int] = {"cpu": GIB // 2, "cuda": 3 * GIB // 4}
"""What the process takes before the first tensor. CPU: Python, torch, transformers and peft took
0.39 GiB. CUDA: context and cuBLAS workspaces, commonly 0.5 to 0.7 GiB."""
CUDA_HOST_BYTES = 3 * GIB
"""Host memory of a process that trains on CUDA: Python, torch and the CUDA libraries."""
MARGIN = 0.05
"""Share that an allocator loses to rounding and fragmentation, of what comes and goes in a step.
Weights, adapters, optimizer states and the experts' scratch are allocated once and never freed."""
UNSEEN = ("process", "allocator margin")
"""Components that no counting of tensors shows: not in what torch's allocator reports either."""


@dataclass(frozen=True)
class Plan:
    """The sizes of a run, in bytes."""

    components: Mapping[str, int]
    """What lies in the device's memory at the fullest moment; sums to `peak`."""
    moment: str
    """Which moment that is: `loss`, `last layer`, `first layer` or `optimizer`."""
    host: int
    """Host RAM of the training process; on the CPU this holds the components too."""
    disk: int
    """Source, base, checkpoints and adapter."""
    weights: int
    """Of the base, on the device."""

    @property
    def peak(self) -> int:
        """The device's memory at the fullest moment."""
        return sum(self.components.values())

    @property
    def tensors(self) -> int:
        """The part of `peak` that torch's allocator counts as tensors."""
        return self.peak - sum(self.components.get(name, 0) for name in UNSEEN)


# Weights.


# A search for what would fit plans the same model some hundred times.
_tensors = lru_cache(maxsize=16)(spec.tensors)
parameters = lru_cache(maxsize=16)(spec.parameters_by_role)
# Of the disk. What they import loads numpy, which the wizard's first frame need not wait for.


@lru_cache(maxsize=16)
def _freed_peak(dims: spec.Dimensions, to: str) -> int:
    from ms4.weights.schedule import as_published

    return as_published(dims, to, free=True).peak()


@lru_cache(maxsize=16)
def _source_bytes(dims: spec.Dimensions) -> int:
    from ms4.weights.shards import table_bytes

    return table_bytes(spec.disk_tensors(dims))


@lru_cache(maxsize=16)
def _base_bytes(dims: spec.Dimensions, to: str) -> int:
    from ms4.weights.shards import table_bytes
    from ms4.weights.tables import base_table

    return table_bytes(base_table(dims, to))


def nf4_bytes(shape: tuple[int, ...]) -> int:
    """An expert projection [E, out, in] in NF4: E · (n/2 codes + ⌈n/64⌉ absmax codes
    + 4 · ⌈blocks/256⌉ scales + 4 for the offset), n = out · in."""
    experts, numel = shape[0], math.prod(shape[1:])
    blocks = math.ceil(numel / NF4_BLOCK)
    return experts * (math.ceil(numel / 2) + blocks + 4 * math.ceil(blocks / ABSMAX_BLOCK) + 4)


@lru_cache(maxsize=32)
def expert_bytes(dims: spec.Dimensions, experts: str) -> int:
    """All routed experts: NF4 as `nf4_bytes` has it; FP8 1 byte a weight and a BF16 scale an
    expert; BF16 2 bytes a weight."""
    shapes = [tensor.shape for tensor in _tensors(dims) if tensor.role == "experts"]
    if experts == "nf4":
        return sum(map(nf4_bytes, shapes))
    if experts == "fp8":
        return sum(math.prod(shape) + 2 * shape[0] for shape in shapes)
    return sum(2 * math.prod(shape) for shape in shapes)


def weights(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> dict[str, int]:
    """The base by part: b bytes a weight, but for what is held packed (see `ms4.model.frozen`): the
    routed experts; as FP8, 1 byte a weight and 2 for its scale, the dense matrices of the text
    model. On CUDA the embedding is in host memory."""
    count, width = parameters(dims), COMPUTE_BYTES[kind]
    return {
        f"routed experts ({config.model.experts})": expert_bytes(dims, config.model.experts),
        "attention": _dense_bytes(config, dims, kind, "attention"),
        "shared experts": _dense_bytes(config, dims, kind, "shared"),
        "embedding": 0 if _embedding_on_host(config, kind) else width * count["embedding"],
        "head": width * count["head"],
        "router and norms": width * (count["router"] + count["norm"]),
        "vision": width * (count["vision"] + count["projector"]),
    }


def _dense_bytes(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, role: spec.Role
) -> int:
    if not _packed(config, kind):
        return COMPUTE_BYTES[kind] * parameters(dims)[role]
    found = [tensor for tensor in _tensors(dims) if tensor.role == role]
    return sum(math.prod(t.shape) + 2 for t in found)


def _packed(config: RunConfig, kind: DeviceKind) -> bool:
    """Whether the dense layers are held as FP8."""
    return config.method == "lora" and config.model.dense_on(kind) == "fp8"


def _embedding_on_host(config: RunConfig, kind: DeviceKind) -> bool:
    return config.method == "lora" and kind == "cuda"


# What is trained.


@lru_cache(maxsize=64)
def adapter_parameters(dims: spec.Dimensions, preset: Preset, rank: int) -> int:
    """LoRA parameters of a preset: r · (in + out) for each matrix, of each expert its own."""
    return rank * sum(
        math.prod(tensor.shape[:-2]) * sum(tensor.shape[-2:])
        for tensor in _tensors(dims)
        if tensor.role == preset
    )


def _adapters(config: RunConfig, dims: spec.Dimensions) -> int:
    return sum(
        adapter_parameters(dims, preset, config.adapters.rank_of(preset))
        for preset in config.adapters.presets
    )


def trained_parameters(config: RunConfig, dims: spec.Dimensions) -> int:
    """Adapters, or for a full fine-tuning all of the text model."""
    if config.method == "full":
        return sum(
            count for role, count in parameters(dims).items() if role not in ("vision", "projector")
        )
    return _adapters(config, dims)


def trained_width(config: RunConfig) -> int:
    """Bytes of a trained parameter, and of its gradient."""
    return 2 if config.method == "full" or config.adapters.dtype == "bf16" else 4


def optimizer_bytes(config: RunConfig, trained: int) -> int:
    """AdamW's two moments: 4 bytes each, or 1 and 4 for each block of 256."""
    if config.train.optimizer == "adamw":
        return 8 * trained
    return 2 * (trained + 4 * math.ceil(trained / OPTIMIZER_BLOCK))


# Activations.


def slice_experts(dims: spec.Dimensions, kind: DeviceKind) -> int:
    """Experts that are dequantized and multiplied at once."""
    if kind == "cuda":
        return min(dims.experts, EXPERT_SLICE)
    largest = 2 * dims.expert_width * dims.hidden * COMPUTE_BYTES[kind]
    return min(dims.experts, max(1, CPU_SLICE_BYTES // largest))


def slice_rows(rows: int, size: int, experts: int) -> int:
    """Rows that a slice of `size` of the experts takes at once, of so many that are routed."""
    return max(SLICE_ROWS, math.ceil(SLICE_SHARES * rows * size / experts))


def layer_saved(config: RunConfig, dims: spec.Dimensions, tokens: int, width: int) -> int:
    """What a layer keeps for its backward pass if nothing is computed again.

    Attention: T·b·(D·A q + D·A k + A·(nope+value) k and v together + 2·A·value v and out),
    T·4·A sums, and for its adapters T·b·(H + Q + R normed).
    Experts: T·b·(H normed + K·2I gate and up + E router).
    Shared: T·b·3S gate, its SiLU and up, and for its adapters T·b·S, their product.
    Norms, FP32: T·4·(2H + Q + R).
    Adapters: T·b·r for each dense matrix and r · (in + out) · b of each cast; with dropout
    T·(b+1)·in, the inputs that are left and which those are.
    """
    H, A, S = dims.hidden, dims.heads, dims.expert_width * dims.shared_experts
    low = dims.q_rank + dims.kv_rank
    attention = A * (2 * dims.head + dims.nope + 3 * dims.value)
    moe = H + dims.experts_per_token * 2 * dims.expert_width + dims.experts + 3 * S
    dense = 0
    presets = config.adapters.presets if config.method == "lora" else ("attention", "shared")
    if "attention" in presets:
        dense += H + low
    if "shared" in presets:
        dense += S
    exact = 4 * (2 * H + low + A)
    return tokens * (width * (attention + moe + dense) + exact) + _adapters_saved(
        config, dims, tokens, width
    )


def _dense_inputs(config: RunConfig, dims: spec.Dimensions) -> list[int]:
    """Width of the input of each dense matrix of a layer that has an adapter."""
    H, S = dims.hidden, dims.expert_width * dims.shared_experts
    inputs = {
        "attention": [H, dims.q_rank, H, dims.kv_rank, dims.heads * dims.value],
        "shared": [H, H, S],
    }
    if config.method == "full":
        return []
    return [size for preset in config.adapters.presets for size in inputs.get(preset, ())]


def _dense_adapters(config: RunConfig, dims: spec.Dimensions) -> int:
    """Dense adapters' parameters of one layer."""
    if config.method == "full":
        return 0
    rank = config.adapters.rank
    found = (adapter_parameters(dims, p, rank) for p in config.adapters.presets if p != "experts")
    return sum(found) // dims.layers


def _adapters_saved(config: RunConfig, dims: spec.Dimensions, tokens: int, width: int) -> int:
    inputs = _dense_inputs(config, dims)
    thin = tokens * width * config.adapters.rank * len(inputs)
    cast = width * _dense_adapters(config, dims) if trained_width(config) != width else 0
    dropped = tokens * (width + 1) * sum(inputs) if config.adapters.dropout else 0
    return thin + cast + dropped


def layer_kept(config: RunConfig, dims: spec.Dimensions, tokens: int, width: int) -> int:
    """What a layer keeps beside its input until its backward pass comes.

    `full` (and `auto`): nothing. `selective`: T·b·(A·value attention + H o + Q q_a + R+rope kv_a
    + 2S gate and up + E router + r for each dense adapter) and T·4·A sums. `none`: `layer_saved`,
    of which the input is no part.
    """
    policy = config.train.checkpointing
    if policy == "none":
        return layer_saved(config, dims, tokens, width)
    if policy != "selective":
        return 0
    narrow = dims.heads * dims.value + dims.hidden + dims.q_rank + dims.kv_rank + dims.rope
    narrow += 2 * dims.expert_width * dims.shared_experts + dims.experts
    narrow += config.adapters.rank * len(_dense_inputs(config, dims))
    return tokens * (width * narrow + 4 * dims.heads)


def layer_transient(config: RunConfig, dims: spec.Dimensions, tokens: int, kind: DeviceKind) -> int:
    """What lives beside that while the routed experts of a layer are in their backward pass.

    T·b·(2H gradients of the layer + K·H of the experts' inputs), and of the n rows that a slice
    takes at once: n·b·(H gradient + 2I of gate and up + 4I SiLU, product and gradients). Their
    number is that of the worst routing, `SLICE_SHARES` times a slice's share of T·K.
    With adapters, the slice's share of them cast, and the gradients of one projection.
    """
    width, K = COMPUTE_BYTES[kind], dims.experts_per_token
    share = slice_experts(dims, kind) / dims.experts
    routed = tokens * K
    rows = min(routed, slice_rows(routed, slice_experts(dims, kind), dims.experts))
    moving: float = rows * width * (dims.hidden + 6 * dims.expert_width)
    moving += tokens * width * (2 * dims.hidden + K * dims.hidden)
    if config.method == "lora" and "experts" in config.adapters.presets:
        rank = config.adapters.rank_of("experts")
        moving += 2 * share * width * adapter_parameters(dims, "experts", rank) / dims.layers
    return math.ceil(moving)


def expert_scratch(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> int:
    """The slice in the compute dtype: 2·H·I weights of gate and up an expert, b bytes each; NF4
    beside it 5 bytes a block for its absmax. BF16 on CUDA is used as it lies. A dense matrix that
    is held as FP8 takes its turn in the same memory."""
    width = COMPUTE_BYTES[kind]
    dense = 0
    if _packed(config, kind):
        roles = ("attention", "shared")
        dense = width * max(math.prod(t.shape) for t in _tensors(dims) if t.role in roles)
    if config.model.experts == "bf16" and width == 2:
        return dense
    numel = slice_experts(dims, kind) * 2 * dims.hidden * dims.expert_width
    absmax = 5 * math.ceil(numel / NF4_BLOCK) if config.model.experts == "nf4" else 0
    return max(numel * width, dense) + absmax


def image_tower(dims: spec.Dimensions, patches: int, width: int) -> int:
    """What the vision tower needs for one image, without gradients: P·b·(3F gate, its GELU and up
    + 5U residual, normed and embedded patches + 2·D cos and sin + P mask of transformers')."""
    row = patches + 3 * dims.vision_width + 5 * dims.vision_hidden + 2 * dims.vision_head
    return patches * width * row


def _largest_image(config: RunConfig, dims: spec.Dimensions) -> int:
    """Patches of it; its tokens fit in a sequence."""
    token = dims.merge**2
    side = dims.merge * math.ceil(config.data.images.max_size / (dims.patch * dims.merge))
    return min(side**2, token * config.data.sequence_length)


# The plan.


def _held(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> dict[str, int]:
    """What is there throughout."""
    width, train = COMPUTE_BYTES[kind], config.train
    tokens = train.micro_batch * config.data.sequence_length
    trained, paged = trained_parameters(config, dims), train.optimizer.startswith("paged")
    seen = tokens if config.data.modality == "text_vision" else 0
    return {
        "adapters": trained_width(config) * trained if config.method == "lora" else 0,
        "optimizer state": 0 if paged and kind == "cuda" else optimizer_bytes(config, trained),
        # In memory that is held on CUDA; a CPU's allocator hands out the same again.
        "dequantized experts": expert_scratch(config, dims, kind),
        # cos and sin of the rotary angles, positions, tokens and targets.
        "batch": tokens * (2 * width * dims.rope + 3 * 8),
        # BF16; as if every token were a part of an image.
        "pixels": seen * (dims.patch * dims.merge) ** 2 * 3 * 2,
        "process": PROCESS_BYTES[kind],
    }


def _moments(
    config: RunConfig, dims: spec.Dimensions, kind: DeviceKind
) -> dict[str, dict[str, int]]:
    """What is there beside that at the moments that can be the fullest."""
    width, train, L = COMPUTE_BYTES[kind], config.train, dims.layers
    tokens = train.micro_batch * config.data.sequence_length
    trained = trained_parameters(config, dims)
    gradients = trained_width(config) * trained
    # Those of the micro-steps before are there from the start, and a layer's new ones beside them.
    before = gradients if train.accumulation > 1 else 0
    one_layer = tokens * dims.hidden * width
    inputs = one_layer * (2 if train.offload_activations else L)
    if train.checkpointing == "none":
        inputs = one_layer  # what the layers save has no input, but for the first
    kept = layer_kept(config, dims, tokens, width)
    again = layer_saved(config, dims, tokens, width) - kept
    # The shared experts are through when the routed ones begin.
    shared = tokens * width * 4 * dims.expert_width * dims.shared_experts
    transient = max(0, again - shared if train.checkpointing != "none" else -shared) + (
        layer_transient(config, dims, tokens, kind)
    )
    chunk = min(train.loss_chunk, tokens)
    images = {
        "gradients": before,
        # As if every token were a part of one.
        "image features": one_layer,
        "vision tower": image_tower(dims, _largest_image(config, dims), width),
    }
    return {
        **({"images": images} if config.data.modality == "text_vision" else {}),
        "loss": {
            "gradients": before,
            "layer inputs": inputs,
            "layer activations": L * kept,
            # The last norm's input in FP32 and its result, the gradient of that.
            "head's hidden states": tokens * dims.hidden * (4 + 2 * width),
            # Logits of a chunk in FP32 and in the compute dtype, one of them its gradient.
            "loss chunk": chunk * (dims.vocabulary * (4 + width % 4) + width * dims.hidden),
        },
        "last layer": {
            "gradients": max(before, gradients // L) + (gradients // L if before else 0),
            "layer inputs": inputs,
            "layer activations": L * kept,
            "backward of a layer": transient,
        },
        "first layer": {
            "gradients": gradients + (gradients // L if before else 0),
            "layer inputs": one_layer,
            "layer activations": kept,
            "backward of a layer": transient,
        },
        "optimizer": {"gradients": gradients},
    }


def plan(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind) -> Plan:
    """The sizes of the run that `config` describes, on a device of a kind.

    T = micro_batch · sequence_length: bins are planned as full. `train.checkpointing: auto` is
    planned as `full`; `ms4.fitting.choose_checkpointing` says what it comes to.
    """
    base, held = weights(config, dims, kind), _held(config, dims, kind)
    moments = _moments(config, dims, kind)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    margin = math.ceil(MARGIN * sum(moments[moment].values()))
    components = {**base, **held, **moments[moment], "allocator margin": margin}
    components = {name: amount for name, amount in components.items() if amount}
    trained = trained_parameters(config, dims)
    base_disk = _base_bytes(dims, config.model.experts)
    state = trained_width(config) * trained + optimizer_bytes(config, trained)
    # Two checkpoints are kept while a third is written; the result beside them, FP32 adapters.
    written = base_disk + 3 * state + (4 if config.method == "lora" else 2) * trained
    if config.model.free_source:  # shards come and go before anything is trained
        disk = max(_freed_peak(dims, config.model.experts), written)
    else:
        disk = _source_bytes(dims) + written
    return Plan(
        components,
        moment,
        host=_host(config, dims, kind, sum(components.values())),
        disk=disk,
        weights=sum(base.values()),
    )


def _host(config: RunConfig, dims: spec.Dimensions, kind: DeviceKind, device: int) -> int:
    """RAM: on a CPU the components. Else the libraries, the embedding, the base's largest piece and
    a checkpoint, each on its way, what is offloaded, and paged moments."""
    if kind == "cpu":
        return device
    trained = trained_parameters(config, dims)
    moments = optimizer_bytes(config, trained)
    piece = max(
        _base_bytes(dims, config.model.experts) // dims.layers, 4 * dims.vocabulary * dims.hidden
    )
    total = CUDA_HOST_BYTES + piece + trained_width(config) * trained + moments
    if _embedding_on_host(config, kind):
        total += COMPUTE_BYTES[kind] * parameters(dims)["embedding"]
    if config.train.optimizer.startswith("paged"):
        total += moments
    if config.train.offload_activations:
        tokens = config.train.micro_batch * config.data.sequence_length
        total += dims.layers * tokens * dims.hidden * COMPUTE_BYTES[kind]
    return total


def size(amount: int) -> str:
    """Bytes as GiB, small ones as MiB."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / 2**20:.1f} MiB"
