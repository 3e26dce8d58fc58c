"""The loss of a text, layer by layer from the files: no GPU, and never the model in memory.

transformers' own decoder layers are built without memory and filled one after the other; experts
are read, used and forgotten one at a time. The text goes through with several softmax scales at
once, so that each weight is read once. Everything is computed in fp32.

Shape letters: N softmax scales, T tokens, S = N·T rows, C rows whose loss counts, K routes of a
token, E experts, A heads, D head dimension, H hidden, V vocabulary, O out, I in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from transformers import AttentionInterface, Mistral3Config, Mistral4Model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import configs, fp8, nf4
from ms4.weights.layouts import Segment, Source
from ms4.weights.meter import Meter
from ms4.weights.shards import Bytes, Entry, Reader, read_header
from ms4.weights.tables import pieces
from ms4.weights.texts import Text

IMPLEMENTATION = "ms4_streamed"
"""The name under which transformers finds the attention and the experts of this module."""
READERS = 4
"""Threads that read and decode ahead of the computation, at most."""
HEAD_ELEMENTS = 1 << 24
"""Weights of the head that are held at once: those of one expert's projection."""


class Weights(ABC):
    """A model's text weights, read in parts as fp32; safe to share between threads."""

    dims: spec.Dimensions
    config: Mapping[str, Any]
    """Its config.json."""

    @abstractmethod
    def part(self, tensor: spec.Tensor, start: int, count: int) -> torch.Tensor:
        """`count` elements from element `start` of a parameter on; of experts, one whole one."""

    def whole(self, tensor: spec.Tensor) -> torch.Tensor:
        """A parameter without experts."""
        return self.part(tensor, 0, tensor.numel).view(tensor.shape)

    def expert(self, tensor: spec.Tensor, number: int) -> torch.Tensor:
        """One expert's projection [O, I]."""
        _, out, inner = tensor.shape
        return self.part(tensor, number * out * inner, out * inner).view(out, inner)

    def rows(self, tensor: spec.Tensor, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a matrix."""
        width = tensor.shape[1]
        return self.part(tensor, first * width, (last - first) * width).view(-1, width)


def _from_bf16(data: Bytes) -> torch.Tensor:
    return torch.from_numpy(data).view(torch.bfloat16).float()


def _from_fp8(codes: Bytes, scale: float) -> torch.Tensor:
    """The BF16 products, in parts that stay in the cache."""
    made = np.empty(len(codes), np.uint16)
    for at in range(0, len(codes), fp8.CHUNK):
        fp8.descale_codes(codes[at : at + fp8.CHUNK], scale, made[at : at + fp8.CHUNK])
    return _from_bf16(made.view(np.uint8))


class BaseWeights(Weights):
    """Those of a converted base."""

    def __init__(
        self,
        directory: Path,
        dims: spec.Dimensions,
        config: Mapping[str, Any],
        to: str,
        reader: Reader,
    ) -> None:
        """`to` is how it stores FP8 tensors; its keys must have been checked."""
        self.dims, self.config, self._to, self._reader = dims, config, to, reader
        self._entries: dict[str, Entry] = {}
        for name in pieces(dims):
            self._entries |= read_header(directory / name)

    def _read(self, name: str, offset: int, size: int) -> Bytes:
        return self._reader.read(self._entries[name], offset, size)

    def part(self, tensor: spec.Tensor, start: int, count: int) -> torch.Tensor:
        if self._to == "nf4" and tensor.role == "experts":
            return self._unpacked(tensor, start, count)
        if self._to == "fp8" and tensor.dtype == "F8_E4M3":
            matrix = start // count if tensor.role == "experts" else 0
            scale = float(_from_bf16(self._read(tensor.scale, 2 * matrix, 2)))
            return _from_fp8(self._read(tensor.disk, start, count), scale)
        return _from_bf16(self._read(tensor.disk, 2 * start, 2 * count))

    def _unpacked(self, tensor: spec.Tensor, start: int, count: int) -> torch.Tensor:
        """One whole expert."""
        number, parts = start // count, []
        experts, out, inner = tensor.shape
        for suffix in nf4.SUFFIXES:
            entry = self._entries[tensor.disk + suffix]
            size = entry.size // experts
            data = torch.from_numpy(self._reader.read(entry, number * size, size))
            parts.append(data.view(torch.float32) if entry.dtype == "F32" else data)
        codes, absmax, scale, offset = parts
        packed = nf4.Packed(codes[None], absmax[None], scale[None], offset)
        return nf4.dequantize(packed, (1, out, inner), torch.float32).view(-1)


class SourceWeights(Weights):
    """The exact BF16 products of an FP8 checkpoint, in either layout."""

    def __init__(self, source: Source) -> None:
        """All files of the text model must be here."""
        self.dims, self.config, self._source = source.dims, source.config, source
        self._segments: dict[str, list[Segment]] = {}

    def part(self, tensor: spec.Tensor, start: int, count: int) -> torch.Tensor:
        found = []
        if tensor.disk not in self._segments:  # made once: each reads its scale
            self._segments[tensor.disk] = self._source.segments(tensor)
        for segment in self._segments[tensor.disk]:
            first = max(start, segment.at)
            some = min(start + count, segment.at + segment.count) - first
            if some > 0:
                data = self._source.read(segment, first - segment.at, some)
                coded = segment.entry.dtype == "F8_E4M3"
                found.append(_from_fp8(data, segment.scale) if coded else _from_bf16(data))
        return found[0] if len(found) == 1 else torch.cat(found)


# What transformers calls.


def _attention(
    module: Any,
    query_NATD: torch.Tensor,
    key_NATD: torch.Tensor,
    value_NATD: torch.Tensor,
    attention_mask: None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row with its own softmax scale and of each document by itself;
    returns [N, T, A, D] and no weights."""
    rows = []
    for number, scale in enumerate(module.scales_N):
        documents = zip(
            *(
                part[number, None].split(module.lengths, dim=2)
                for part in (query_NATD, key_NATD, value_NATD)
            ),
            strict=True,
        )
        parts = [
            F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
            for query, key, value in documents
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous(), None


def _experts(
    module: Any, hidden_SH: torch.Tensor, routes_SK: torch.Tensor, weights_SK: torch.Tensor
) -> torch.Tensor:
    """The experts' weighted sum for each row: [S, H]; an expert that is used is read once."""
    result_SH = torch.zeros_like(hidden_SH)
    used = torch.unique(routes_SK).tolist()
    for expert, gate_up, down in module.read_experts(used):
        rows, route = torch.where(routes_SK == expert)
        gate, up = F.linear(hidden_SH[rows], gate_up).chunk(2, dim=-1)
        out = F.linear(module.act_fn(gate) * up, down)
        result_SH.index_add_(0, rows, out * weights_SK[rows, route][:, None])
    return result_SH


AttentionInterface.register(IMPLEMENTATION, _attention)
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


class _Streamed:
    """transformers' text model without its weights, filled and run a layer at a time."""

    def __init__(
        self,
        weights: Weights,
        scales: Sequence[str],
        threads: int,
        pool: ThreadPoolExecutor,
        meter: Meter,
    ) -> None:
        self._weights, self._pool, self._meter = weights, pool, meter
        self._threads = threads
        self._by_name = {
            tensor.transformers.removeprefix("model.language_model."): tensor
            for tensor in spec.tensors(weights.dims)
        }
        texts = [self._build(scale) for scale in scales]
        self._scales_N = [self._scale(*pair) for pair in zip(texts, scales, strict=True)]
        self._text = texts[0]

    def _build(self, scale: str) -> Any:
        config = configs.base_config(self._weights.config, self._weights.dims, scale)
        with init_empty_weights(include_buffers=False):
            text = Mistral4Model(Mistral3Config(**config).text_config)
        text.set_attn_implementation(IMPLEMENTATION)
        text.set_experts_implementation(IMPLEMENTATION)
        return text.requires_grad_(False).eval()

    def _scale(self, text: Any, scale: str) -> float:
        """What transformers makes of the softmax scale `scale`: that must be the wanted number,
        and nothing else may depend on it."""
        rope = self._weights.config["text_config"].get("rope_parameters") or {}
        wanted = self._weights.dims.softmax_scales(rope)[scale]
        found = {float(layer.self_attn.scaling) for layer in text.layers}
        turned = float(text.rotary_emb.attention_scaling)
        if turned != 1 or any(abs(value / wanted - 1) > 1e-6 for value in found):
            raise Ms4Error(
                f"transformers makes {sorted(found)} of the softmax scale `{scale}`, which is "
                f"{wanted}, and multiplies the rotary embedding by {turned}, not 1: install the "
                "version of transformers that ms4 asks for."
            )
        return found.pop()

    def _fill(self, prefix: str, module: nn.Module) -> None:
        """Give a part of the model its weights, all but the experts'."""
        state = {}
        for name, _ in module.named_parameters():
            tensor = self._by_name[prefix + name]
            if tensor.role != "experts":
                state[name] = self._weights.whole(tensor)
                self._meter.add(tensor.numel)
        module.load_state_dict(state, strict=False, assign=True)

    def _ahead(self, wanted: Iterable[tuple[spec.Tensor, int]]) -> Iterator[torch.Tensor]:
        """Experts' projections in turn, as many as there are threads read ahead of their use."""
        waiting: deque[Future[torch.Tensor]] = deque()
        for one in wanted:
            waiting.append(self._pool.submit(self._weights.expert, *one))
            if len(waiting) > self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _experts(
        self, number: int, used: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(expert, gate over up, down) of those of a layer's experts that are used."""
        pair = [
            self._by_name[f"layers.{number}.mlp.experts.{name}"] for name in spec.EXPERT_PROJECTIONS
        ]
        each = sum(tensor.numel for tensor in pair) // pair[0].shape[0]
        self._meter.add((pair[0].shape[0] - len(used)) * each)
        matrices = self._ahead((tensor, expert) for expert in used for tensor in pair)
        for expert in used:
            yield expert, next(matrices), next(matrices)
            self._meter.add(each)

    def hidden(self, text: Text) -> torch.Tensor:
        """What the head sees of each token under each scale: [N, T, H]."""
        positions_1T = torch.from_numpy(text.positions)[None]
        embedding = self._by_name["embed_tokens.weight"]
        rows = [self._weights.rows(embedding, token, token + 1) for token in text.tokens.tolist()]
        hidden_NTH = torch.cat(rows).expand(len(self._scales_N), -1, -1)
        turned = self._text.rotary_emb(hidden_NTH, positions_1T)
        for number in range(self._weights.dims.layers):
            layer = self._text.layers[number]
            self._fill(f"layers.{number}.", layer)
            layer.self_attn.scales_N = self._scales_N
            layer.self_attn.lengths = np.bincount(text.documents).tolist()
            layer.mlp.experts.read_experts = partial(self._experts, number)
            hidden_NTH = layer(
                hidden_NTH,
                position_ids=positions_1T,
                position_embeddings=turned,
            )
            self._text.layers[number] = nn.Identity()  # lets go of its weights
        self._fill("norm.", self._text.norm)
        normed: torch.Tensor = self._text.norm(hidden_NTH)
        return normed

    def losses(self, hidden_NCH: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each row, a chunk of the vocabulary at a time: float64 [N, C]."""
        head = self._by_name["lm_head.weight"]
        vocabulary, width = head.shape
        step = max(1, HEAD_ELEMENTS // width)
        total = torch.full(hidden_NCH.shape[:2], -torch.inf, dtype=torch.float64)
        wanted = torch.zeros_like(total)
        for first in range(0, vocabulary, step):
            last = min(first + step, vocabulary)
            logits = F.linear(hidden_NCH, self._weights.rows(head, first, last)).double()
            total = torch.logaddexp(total, logits.logsumexp(dim=-1))
            (here,) = torch.where((targets_C >= first) & (targets_C < last))
            wanted[:, here] = logits[:, here, targets_C[here] - first]
            self._meter.add((last - first) * width)
        return total - wanted


@torch.no_grad()
def token_losses(weights: Weights, text: Text, scales: Sequence[str], label: str) -> torch.Tensor:
    """The loss of each token that counts, in nats, under each softmax scale: float64 [N, C].

    Args:
        weights: of the model.
        text: the tokens.
        scales: the configuration's names of the softmax scales.
        label: of the progress.

    Raises:
        Ms4Error: a file fails, or transformers makes another softmax scale of the configuration.
    """
    read = sum(
        tensor.numel
        for tensor in spec.tensors(weights.dims)
        if tensor.role not in ("embedding", "vision", "projector")
    )
    threads = min(READERS, torch.get_num_threads())
    with Meter(label, read) as meter, ThreadPoolExecutor(threads) as pool:
        model = _Streamed(weights, scales, threads, pool, meter)
        counted = np.flatnonzero(text.counted)
        # The loss of a token is taken where the one before it stands.
        hidden_NCH = model.hidden(text)[:, counted - 1]
        return model.losses(hidden_NCH, torch.from_numpy(text.tokens[counted]))
