"""The typed tree of answers, which is also what `--answers FILE` may hold.

Answers are a configuration and, beside it, where the pipeline runs. The questions (`steps.STEPS`)
ask for the part of it that a person should decide; the rest keeps its default, and any of it can be
set in an answers file or by `--set`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, field_validator

from ms4 import config, settings

SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}$")]
"""Of a partition or an account. Snakemake evaluates what stands in a profile as Python: quoted,
and of these characters, it is only ever a name."""


Requeue = Literal["cluster", "always", "never"]
"""What Slurm is told of a job whose node failed."""

ONE_GPU = "training runs on one GPU of one node in this version"
"""Why neither GPUs nor nodes can be chosen."""


class Where(config.Section):
    """Where the pipeline runs; this goes to the project's profiles, not to its configuration."""

    run: Literal["local", "slurm"] = "local"
    """`local`: all stages on this machine; `slurm`: each stage is a job."""

    partition: SlurmName | None = None
    """Slurm partition of the jobs; null: the cluster's default."""

    account: SlurmName | None = None
    """Slurm account that the jobs are charged to; null: your default."""

    hours: int | None = Field(default=None, ge=1, le=8760)
    """Time limit of the training job in hours (null: 24). A job that meets it is submitted again
    and goes on from its last checkpoint."""

    gpus: int = 1
    """GPUs of a job that uses one: 1. Training runs on one GPU in this version."""

    nodes: int = 1
    """Nodes of a job: 1, as one GPU is on one node."""

    requeue: Requeue = "cluster"
    """Whether Slurm itself begins a job again whose node failed or that was preempted: `always`,
    `never` (Snakemake submits another one), or `cluster`: as the cluster is set up. Either way the
    stage goes on from what is there."""

    @field_validator("gpus", "nodes")
    @classmethod
    def _one(cls, number: int) -> int:
        if number != 1:
            raise ValueError(f"{ONE_GPU}: leave it at 1 (it is {number})")
        return number


class Answers(config.RunConfig):
    """All answers. Relative paths are relative to the directory that the wizard is started in."""

    where: Where = Where()
    """Where the pipeline runs."""

    def configuration(self) -> config.RunConfig:
        """The part that is the project's configuration."""
        return config.RunConfig.model_validate(self.model_dump(exclude={"where"}))


def schema() -> str:
    """The JSON schema of an answers file."""
    return config.json_schema(Answers, "ms4-wizard answers")


def field_type(field: str) -> Any:
    """The type of a dotted field of the answers, with its limits.

    Raises:
        Ms4Error: there is no such field.
    """
    return settings.field_type(field, Answers)


def read_setting(setting: str) -> tuple[str, Any]:
    """The answer and the value of `key=value`.

    Raises:
        Ms4Error: there is no such field, or it cannot hold that.
    """
    return settings.read_setting(setting, Answers)


def may_be_empty(field: str) -> bool:
    """Whether a field may be null, which is typed as nothing."""
    kind = field_type(field)
    return type(None) in get_args(kind) or (
        get_origin(kind) is Annotated and type(None) in get_args(get_args(kind)[0])
    )
