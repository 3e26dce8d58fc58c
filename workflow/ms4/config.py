"""The configuration of a run: one typed tree, loaded, checked and dumped here.

Every field has a docstring (with its unit) and a default where one makes sense.
An unknown key is an error. No torch here: the wizard and the planner import it.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ms4 import yaml_text
from ms4.config_data import EFFORTS as EFFORTS
from ms4.config_data import DataSection as DataSection
from ms4.config_data import Effort as Effort
from ms4.config_data import Name as Name
from ms4.config_data import Section as Section
from ms4.config_faults import describe
from ms4.errors import Ms4Error
from ms4.home import expand_home as expand_home
from ms4.manifest import sha256_json

Stage = Literal["fetch", "descale", "verify", "preprocess", "plan", "train", "evaluate", "deliver"]
STAGES: tuple[Stage, ...] = get_args(Stage)

Dense = Literal["fp8", "full"]
"""How dense layers are held."""

Preset = Literal["attention", "shared", "experts"]
"""Layers that get adapters together."""
PRESETS: tuple[Preset, ...] = get_args(Preset)

Target = Literal[Preset, "all"]

Checkpointing = Literal["full", "selective", "none"]
"""What a decoder layer keeps for its backward pass; see `ms4.model.checkpointing`."""

Config = TypeVar("Config", bound="RunConfig")


class ModelSection(Section):
    """Which weights, and how they are held."""

    source: str = Field(default="mistralai/Mistral-Small-4-119B-2603", min_length=1)
    """Hub id (`owner/name`), a local directory in either layout, or `tiny`: the built-in
    2-million-parameter model, made on the spot in a few minutes, for trying the pipeline."""

    revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """Commit, tag or branch on the hub; the commit that it stood for is recorded.
    null: the main branch. Not for local directories."""

    layout: Literal["hf", "native"] = "hf"
    """Which files of a hub are fetched: `hf` (config.json, model-*.safetensors) or `native`
    (params.json, consolidated-*.safetensors). A local directory is read in the layout that it
    holds, in this one if it holds both."""

    free_source: bool = False
    """Convert shards while others are fetched, and remove each when what was made of it is
    verified: less disk, but no FP8 export with the source's own codes. Only with a hub id."""

    experts: Literal["nf4", "fp8", "bf16"] = "nf4"
    """How the routed experts are held in memory: `nf4` (4.13 bits a weight), `fp8` as published, or
    `bf16`, which says the same as `fp8` in twice the memory."""

    dense: Literal["auto", "fp8", "full"] = "auto"
    """How the text model's other linear layers are held: `fp8` as published, or `full`, in the
    dtype of the computation. Both compute the same, to the bit. auto: `fp8` on CUDA, `full` on a
    CPU, where it is faster."""

    def dense_on(self, device: str) -> Dense:
        """What `dense` comes to on a kind of device, `cpu` or `cuda`."""
        if self.dense == "auto":
            return "fp8" if device == "cuda" else "full"
        return self.dense

    softmax_scale: Literal["plain", "yarn"] = "plain"
    """Attention's softmax scale: `plain` is 1/sqrt(head dimension), as the published params.json
    and vLLM have it; `yarn` multiplies it by yarn's mscale squared, as some versions of
    transformers do."""


class AdaptersSection(Section):
    """What is trained when `method` is `lora`."""

    targets: tuple[Target, ...] = Field(default=("attention", "shared"), min_length=1)
    """`attention`: the five MLA projections; `shared`: the shared experts' three projections;
    `experts`: all routed experts; `all`: the three together."""

    rank: int = Field(default=32, ge=1, le=512)
    """Rank of each adapter."""

    expert_rank: int | None = Field(default=None, ge=1, le=512)
    """Rank of the routed experts' adapters, of which there are many; null: `rank`."""

    alpha: float = Field(default=64.0, gt=0, le=4096)
    """LoRA alpha: adapters are scaled by alpha / rank, each by its own rank."""

    rslora: bool = False
    """Rank-stabilized scaling: by alpha / sqrt(rank)."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a dense adapter's inputs (attention, shared experts) that each step leaves out. The
    routed experts' adapters have none."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """How adapter weights are held while they train. `bf16` takes half of the memory and learns
    less at small learning rates: a step of less than 1/512 of a weight is lost."""

    @field_validator("targets")
    @classmethod
    def _all_of_them(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        return PRESETS if targets == ("all",) else targets

    @property
    def presets(self) -> tuple[Preset, ...]:
        """What `targets` comes to, in a fixed order."""
        return tuple(preset for preset in PRESETS if preset in self.targets)

    def rank_of(self, preset: Preset) -> int:
        """The rank of a preset's adapters."""
        own = self.expert_rank if preset == "experts" else None
        return self.rank if own is None else own

    def scaling(self, preset: Preset) -> float:
        """What a preset's adapters are multiplied by."""
        rank = self.rank_of(preset)
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


class TrainSection(Section):
    """The optimization."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; null: as many as `epochs` takes."""

    epochs: float = Field(default=1.0, gt=0, le=1000)
    """Passes over the training data, if `steps` is not given."""

    micro_batch: int = Field(default=1, ge=1, le=4096)
    """Packed sequences in one forward pass."""

    accumulation: int = Field(default=8, ge=1, le=65536)
    """Forward passes in one optimizer step; their loss is normalized over trained tokens."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    """Peak learning rate of the optimizer."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up: to 0 along a cosine or a line, or not at all."""

    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises linearly."""

    weight_decay: float = Field(default=0.0, ge=0, le=1)
    """AdamW's decoupled weight decay."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global L2 norm."""

    checkpointing: Literal[Checkpointing, "auto"] = "auto"
    """What is recomputed in the backward pass instead of kept: `full`, each layer; `selective`,
    the insides of attention and experts; `none`. `auto`: the fastest that the plan has room for."""

    offload_activations: bool = False
    """Keep the layers' inputs, which checkpointing saves, in host memory. Only on a GPU."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw`: FP32 moments, 8 bytes a parameter; `adamw_8bit`: bitsandbytes' 8-bit ones, 2 bytes;
    `paged_adamw_8bit`: those, in memory that a GPU that is full moves to the host."""

    loss_chunk: int = Field(default=256, ge=1)
    """Tokens whose logits are held at once by the chunked cross-entropy."""

    checkpoint_every: int = Field(default=50, ge=1)
    """Optimizer steps between checkpoints; the last two are kept."""


def cpu_faults(train: TrainSection) -> list[str]:
    """What of `train` a CPU cannot do; `run.device: auto` comes to a CPU only on the machine."""
    faults = []
    if train.optimizer == "paged_adamw_8bit":
        faults.append(
            "train.optimizer: `paged_adamw_8bit` pages GPU memory, and the device is a CPU; "
            "use adamw_8bit"
        )
    if train.offload_activations:
        faults.append(
            "train.offload_activations: on a CPU, the device's memory is the host's; set it to "
            "false"
        )
    return faults


class EvaluateSection(Section):
    """The comparison of the untuned and the tuned model on the held-out sets."""

    efforts: tuple[Effort, ...] = Field(default=EFFORTS, min_length=1)
    """Reasoning efforts in which each held-out set is evaluated."""

    max_samples: int = Field(default=200, ge=1)
    """Samples of each held-out set, the first ones, that are evaluated."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Tokens that a generated answer, thinking included, may have."""

    batch: int = Field(default=8, ge=1)
    """Answers generated at once."""

    min_exact_match: dict[Name, float] = Field(default_factory=dict)
    """Held-out set → share of exact answers (0 to 1) that the tuned model must reach in each
    effort for the verdict to be `pass`."""


class RunSection(Section):
    """The machine that the torch stages use."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the first CUDA device if there is one, else the CPU."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads; null: all cores of the job. A bit-identical rerun needs the same number."""

    memory_gib: float | None = Field(default=None, gt=0, le=1_048_576)
    """Memory budget in GiB of the device that trains (GPU memory, or RAM on the CPU);
    null: what the device has."""


class RunConfig(Section):
    """Everything that decides the result of a run."""

    method: Literal["lora", "full"] = "lora"
    """`lora`: adapters over a frozen base (QLoRA when the experts are in nf4); `full`: all weights
    (planned, not runnable yet)."""

    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialization, data order and sampling."""

    model: ModelSection = ModelSection()
    """Which weights, and how they are held."""

    data: DataSection
    """Which conversations, and how they become tokens."""

    adapters: AdaptersSection = AdaptersSection()
    """What is trained when `method` is `lora`."""

    train: TrainSection = TrainSection()
    """The optimization."""

    evaluate: EvaluateSection = EvaluateSection()
    """The comparison of the untuned and the tuned model on the held-out sets."""

    run: RunSection = RunSection()
    """The machine that the torch stages use."""

    @model_validator(mode="after")
    def _check_across_fields(self) -> RunConfig:
        faults = []
        if self.model.source == "tiny" and self.model.layout != "hf":
            faults.append("model.layout: the tiny model is made in `hf`; remove it")
        if self.model.source == "tiny" and self.model.free_source:
            faults.append("model.free_source: the tiny model is not fetched; remove it")
        if self.method == "full":
            faults.append("method: `full` does not run in this version; use `lora`")
        if self.model.source == "tiny" and self.model.revision is not None:
            faults.append("model.revision: the tiny model has none; remove it")
        if unknown := sorted(set(self.data.weights) - set(self.data.train)):
            faults.append(
                f"data.weights: {', '.join(unknown)} is no entry of data.train; write it as there"
            )
        faults += self._adapter_faults() + self._train_faults()
        sets = [*self.data.test, *(["holdout"] if self.data.holdout else [])]
        if len(set(sets)) < len(sets):
            faults.append("data.test: `holdout` is the set that data.holdout makes; rename yours")
        unknown = sorted(set(self.evaluate.min_exact_match) - set(sets))
        if unknown:
            faults.append(
                f"evaluate.min_exact_match: no held-out set is called {', '.join(unknown)}; "
                f"data.test has {', '.join(sets) or 'none'}"
            )
        for name, share in self.evaluate.min_exact_match.items():
            if not 0 <= share <= 1:
                faults.append(f"evaluate.min_exact_match.{name}: {share} is not between 0 and 1")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _adapter_faults(self) -> list[str]:
        adapters, faults = self.adapters, []
        # `all` alone has become the three presets.
        if len(set(adapters.targets)) != len(adapters.targets) or "all" in adapters.targets:
            faults.append("adapters.targets: names a target twice")
        if "experts" not in adapters.presets and adapters.expert_rank is not None:
            faults.append(
                "adapters.expert_rank: adapters.targets names no routed experts; remove it"
            )
        if adapters.dropout and adapters.presets == ("experts",):
            faults.append(
                "adapters.dropout: only dense layers have it, and adapters.targets names none. "
                "Experts' adapters are saved as `target_parameters`, for which PEFT refuses it: "
                "they change the weight, whose inputs they do not see; set it to 0"
            )
        return faults

    def _train_faults(self) -> list[str]:
        train, faults = self.train, []
        if train.offload_activations and train.checkpointing == "none":
            faults.append(
                "train.offload_activations: without checkpointing no layer's input stands for what "
                "is recomputed; set train.checkpointing to full or selective"
            )
        if self.run.device == "cpu":
            faults += cpu_faults(train)
        return faults

    def data_files(self) -> tuple[str, ...]:
        """All data files, training files first."""
        return (*self.data.train, *self.data.test.values())

    def part(self, stage: Stage) -> dict[str, Any]:
        """The fields that decide what `stage` makes, beyond the outputs of the stages before it."""
        tree = self.model_dump(mode="json")
        wanted: dict[Stage, tuple[str, ...]] = {
            # The tiny model is made from the seed and depends on the thread count; a source that is
            # freed is converted at once.
            "fetch": ("model.source", "model.revision", "model.layout", "model.free_source")
            + (("seed", "run.threads") if self.model.source == "tiny" else ())
            + (("model.experts",) if self.model.free_source else ()),
            "descale": ("model.experts", "model.softmax_scale"),
            "verify": (),
            "preprocess": ("data",),
            "plan": (
                *("method", "model.experts", "model.dense", "data.sequence_length"),
                *("adapters", "train", "run"),
            ),
            "train": ("method", "seed", "adapters", "train", "run.device", "run.threads"),
            "evaluate": ("evaluate", "run.device", "run.threads"),
            "deliver": (),
        }
        part: dict[str, Any] = {}
        for key in wanted[stage]:
            value: Any = tree
            for name in key.split("."):
                value = value[name]
            part[key] = value
        return part

    def part_hash(self, stage: Stage) -> str:
        """Hash of `part(stage)`: it changes exactly when the stage must run again."""
        return sha256_json(self.part(stage))

    def resolve_source(self, start: Path = Path()) -> Path | None:
        """The local directory that `model.source` names, or None if it is a hub id or `tiny`.

        Args:
            start: what a relative path is relative to.
        """
        source = self.model.source
        return None if source == "tiny" else local_directory(source, start)


def check(
    values: Mapping[str, Any],
    where: str,
    root: yaml.Node | None = None,
    model: type[Config] = RunConfig,  # type: ignore[assignment]
) -> Config:
    """Check plain values and return the configuration.

    Args:
        values: the tree, as read from YAML or JSON.
        where: what error messages call it: a file's name.
        root: the YAML nodes that `values` came from, for line numbers.
        model: what it is to become, if more than a configuration.

    Raises:
        Ms4Error: names every field that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Ms4Error(describe(error, where, root, model)) from error


def load(path: Path) -> RunConfig:
    """Read and check a configuration file (YAML; JSON is a subset of it).

    Raises:
        Ms4Error: the file cannot be read or parsed, or a field is wrong.
    """
    values, root = yaml_text.parse(yaml_text.read(path, "configuration file"), str(path))
    return check(values, str(path), root)


def _comment(text: str | None, indent: str) -> str:
    lines = textwrap.wrap(text or "", 98 - len(indent), break_on_hyphens=False)
    return "".join(f"{indent}# {line}\n" for line in lines)


def _dump_section(
    section: BaseModel,
    values: Mapping[str, Any],
    notes: Mapping[str, str],
    indent: str = "",
    prefix: str = "",
) -> str:
    parts = []
    for name, field in type(section).model_fields.items():
        comment = _comment(field.description, indent)
        value = getattr(section, name)
        if note := notes.get(prefix + name):
            comment += _comment(note, indent)
        if isinstance(value, BaseModel):
            body = _dump_section(value, values[name], notes, indent + "  ", f"{prefix}{name}.")
            parts.append(f"\n{comment}{indent}{name}:\n{body}")
            continue
        text = yaml_text.dump({name: values[name]})
        if (
            isinstance(value, tuple)
            and len(short := yaml_text.dump({name: values[name]}, True)) < 60
        ):
            text = short.strip()[1:-1] + "\n"  # `targets: [attention, shared]`, without the braces
        parts.append(comment + textwrap.indent(text, indent))
    return "".join(parts)


def dump(config: RunConfig, notes: Mapping[str, str] | None = None) -> str:
    """The configuration as YAML, every field written out with its meaning above it; `load` gives
    it back. The first line tells editors where the schema is.

    Args:
        config: the configuration.
        notes: dotted field → what stands below its meaning: why it has its value, say.
    """
    head = "# yaml-language-server: $schema=schema.json\n"
    note = _comment(
        "A change here reruns the stages that depend on it, and no others. Relative paths are "
        "relative to the project's directory.",
        "",
    )
    return f"{head}{note}\n{_dump_section(config, config.model_dump(mode='json'), notes or {})}"


def local_directory(source: str, start: Path = Path()) -> Path | None:
    """The directory that a source names, or None if it is a hub id.

    Args:
        source: as a person gave it.
        start: what a relative path is relative to.
    """
    path = expand_home(source)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
    return path if looks_local or (start / path).is_dir() else None


def json_schema(model: type[RunConfig] = RunConfig, title: str = "ms4 configuration") -> str:
    """The JSON schema of a configuration file, as committed in `config/schema.json`."""
    schema = model.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = title
    return json.dumps(schema, indent=2) + "\n"
