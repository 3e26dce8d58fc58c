"""The tiny model: Mistral Small 4 in everything but size, taught on the spot, stored in FP8.

Same layer types, vision tower, tokenizer version and file layout as the published checkpoint, with
2 million parameters. It is trained for a few minutes on generated text (`tiny_text`), so that
fine-tuning has something to improve and something to lose. The same seed gives the same bytes on
the same machine with the same number of threads.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec, tiny_text
from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.data.tekken import write_tekken
from ms4.manifest import commit_file, write_json
from ms4.progress import track
from ms4.weights import configs, fp8

STEPS = 800
BATCH = 48
PEAK_LEARNING_RATE = 3e-3
SHARD_LIMIT = 1_000_000
"""Bytes of one shard: several of them, as in the published checkpoint."""


def _training_config() -> Mistral3Config:
    """The same model for transformers, with the plain softmax scale whatever its version does."""
    config = configs.hf_config(spec.TINY)
    del config["quantization_config"]
    config["dtype"] = "float32"  # faster than bf16 on most CPUs, and what an optimizer wants
    # mscale_all_dim 0 alone would multiply cos and sin by 1.485; attention_factor undoes that.
    config["text_config"]["rope_parameters"] |= {"mscale_all_dim": 0.0, "attention_factor": 1.0}
    return Mistral3Config(**config)


def _batches(chat: Chat, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (tokens [B, T], targets [B, T]); a target is -100 where none is trained."""
    dice = random.Random(seed)  # noqa: S311 - not a secret
    while True:
        encoded = []
        for _ in range(BATCH):
            record = tiny_text.base_record(dice)
            conversation = parse_record(record)
            encoded.append(chat.encode(conversation, record["reasoning_effort"]))
        length = max(len(sample.tokens) for sample in encoded) - 1
        tokens_BT = np.full((BATCH, length), 11, dtype=np.int64)
        targets_BT = np.full((BATCH, length), -100, dtype=np.int64)
        for row, sample in enumerate(encoded):
            size = len(sample.tokens) - 1
            tokens_BT[row, :size] = sample.tokens[:-1]
            targets_BT[row, :size] = np.where(sample.trained[1:] == 1, sample.tokens[1:], -100)
        yield torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT)


def _teach(model: Mistral3ForConditionalGeneration, chat: Chat, seed: int, steps: int) -> float:
    """Train the text model; returns the mean loss of the last steps, at most 50."""
    weights = [p for name, p in model.named_parameters() if "vision" not in name]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    batches = _batches(chat, seed)
    losses = []
    for step in track(range(steps), "teaching the tiny model"):
        # Constant for the first half, then linearly to zero.
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * min(1.0, 2 * (1 - step / steps))
        tokens_BT, targets_BT = next(batches)
        hidden_BTH = model.model(input_ids=tokens_BT).last_hidden_state
        trained = targets_BT != -100  # only these rows need logits
        loss = F.cross_entropy(model.lm_head(hidden_BTH[trained]), targets_BT[trained])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-50:]) / len(losses[-50:])


@torch.no_grad()
def _activation_scales(
    model: Mistral3ForConditionalGeneration, chat: Chat, seed: int
) -> dict[str, torch.Tensor]:
    """Static activation scales from a calibration batch: largest input magnitude / 448, BF16."""
    scales: dict[str, torch.Tensor] = {}
    hooks = []
    tensors = {t.transformers: t for t in spec.tensors(spec.TINY) if t.dtype == "F8_E4M3"}

    def to_scale(largest: torch.Tensor) -> torch.Tensor:
        return (largest.clamp_min(1e-6) / fp8.FP8_MAX).to(torch.bfloat16)

    def of_linear(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            scales[list(tensors[name].scales())[1]] = to_scale(inputs[0].abs().amax())

        return hook

    def of_experts(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden, routes, _ = inputs
            gate_up, down = [], []
            for e in range(spec.TINY.experts):
                x = hidden[(routes == e).any(dim=-1)]
                gate, up = F.linear(x, module.gate_up_proj[e]).chunk(2, dim=-1)
                y = F.silu(gate) * up
                zero = torch.zeros(1)
                gate_up.append(to_scale(torch.cat([zero, x.abs().flatten()]).amax()))
                down.append(to_scale(torch.cat([zero, y.abs().flatten()]).amax()))
            scales[list(tensors[f"{name}.gate_up_proj"].scales())[1]] = torch.stack(gate_up)
            scales[list(tensors[f"{name}.down_proj"].scales())[1]] = torch.stack(down)

        return hook

    for name, module in model.named_modules():
        if f"{name}.weight" in tensors:
            hooks.append(module.register_forward_pre_hook(of_linear(f"{name}.weight")))
        elif f"{name}.gate_up_proj" in tensors:
            hooks.append(module.register_forward_pre_hook(of_experts(name)))
    model.model(input_ids=next(_batches(chat, seed + 1))[0])
    for hook in hooks:
        hook.remove()
    return scales


def store(
    weights: dict[str, torch.Tensor],
    activation_scales: dict[str, torch.Tensor],
    directory: Path,
    dims: spec.Dimensions = spec.TINY,
    shard_limit: int = SHARD_LIMIT,
) -> None:
    """Write a checkpoint in the published layout: FP8 with scales, shards, index.

    Args:
        weights: by their names in transformers, any float dtype.
        activation_scales: by their names on disk.
        directory: where the shards go.
        dims: the model's dimensions.
        shard_limit: bytes of tensor data in a shard, at most.
    """
    on_disk: dict[str, torch.Tensor] = dict(activation_scales)
    for tensor in spec.tensors(dims):
        weight = weights[tensor.transformers]
        if tensor.dtype == "F8_E4M3":
            on_disk[tensor.disk], on_disk[tensor.scale] = fp8.quantize(weight)
        else:
            on_disk[tensor.disk] = weight.to(torch.bfloat16)
    table = spec.disk_tensors(dims)
    shards = spec.plan_shards(table, shard_limit)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        temporary = directory / f".{file}.tmp"
        save_file(
            {name: on_disk[name].contiguous() for name in names},
            temporary,
            metadata={"format": "pt"},
        )
        commit_file(temporary, directory / file)
        weight_map.update(dict.fromkeys(names, file))
    total = sum(on_disk[name].nbytes for name in table)
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def build(directory: Path, seed: int, threads: int | None, steps: int = STEPS) -> None:
    """Make the tiny model's checkpoint in `directory`: about two minutes on two cores.

    Args:
        directory: where the files go; made if need be.
        seed: of the weights and of the text.
        threads: CPU threads; None: all cores.
        steps: optimizer steps of 48 conversations; tests take fewer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds reads of what was never written; it costs 8 % here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    write_tekken(directory / "tekken.json", vocabulary=spec.TINY.vocabulary)
    chat = Chat(directory / "tekken.json")
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration._from_config(
        _training_config(), attn_implementation="sdpa"
    )
    model.model.language_model.set_experts_implementation("grouped_mm")
    model.train()
    model.config.text_config.use_cache = False
    loss = _teach(model, chat, seed, steps)
    model.eval()
    scales = _activation_scales(model, chat, seed)
    store({name: p.detach() for name, p in model.named_parameters()}, scales, directory)
    write_json(directory / "config.json", configs.hf_config(spec.TINY))
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    print(f"the tiny model's loss on its own text: {loss:.3f}")
