"""What the machine has, and the cluster that it belongs to: looked at from here, without torch.

Programs that may hang (nvidia-smi on a sick driver, Slurm's without their controller) get a few
seconds each, and all of them run at once.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from ms4.device import memory_limits

NVIDIA_S = 20.0
"""Seconds that nvidia-smi may take: the driver may have to be loaded first."""
SLURM_S = 6.0
"""Seconds that each of Slurm's programs may take. A controller that lives answers in far less; of
one that does not, they wait for much longer."""


@dataclass(frozen=True)
class FoundGpu:
    """A GPU of this machine."""

    name: str
    gib: float | None
    """Its memory; None if it has none of its own."""


@dataclass(frozen=True)
class Partition:
    """A partition of the cluster."""

    name: str
    default: bool
    up: bool
    nodes: int
    gpus: tuple[str, ...]
    """GPUs of a node, a text for each kind of node: `h200 × 8`; empty: none."""
    cores: int
    """Of its smallest node."""
    memory_gib: float
    """Of its smallest node."""
    limit: str | None
    """The longest time of a job, as Slurm writes it; None: unlimited."""
    accounts: tuple[str, ...] | None
    """Accounts that may use it; None: all."""


@dataclass(frozen=True)
class Slurm:
    """The cluster as its programs tell of it."""

    partitions: tuple[Partition, ...] = ()
    accounts: tuple[str, ...] = ()
    """The user's; empty where the cluster keeps no accounts."""
    fault: str | None = None
    """Why there is nothing to see."""

    @property
    def with_gpus(self) -> tuple[Partition, ...]:
        """The partitions whose nodes have GPUs."""
        return tuple(partition for partition in self.partitions if partition.gpus)


@dataclass(frozen=True)
class Machine:
    """This machine."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    """RAM, or the limit of the container or job around this process."""
    available_gib: float
    disk_gib: float = 0.0
    """Free where the project is to be."""
    gpus: tuple[FoundGpu, ...] = ()
    gpu_fault: str | None = None
    """Why no GPU is seen."""
    cuda: str | None = None
    """The newest CUDA that its driver runs."""
    token_in: str | None = None
    """Where a token for the hub was found. The token itself is not kept."""
    slurm: Slurm | None = None
    """None: no Slurm here."""


@dataclass(frozen=True)
class Answer:
    """What a program printed, or why it printed nothing."""

    text: str = ""
    fault: str | None = None


def ask(command: list[str], seconds: float) -> Answer:
    """Run a program and take what it prints; no longer than `seconds`."""
    if shutil.which(command[0]) is None:
        return Answer(fault=f"{command[0]} is not installed here")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        return Answer(fault=f"{command[0]} does not answer")
    except OSError as error:
        return Answer(fault=f"{command[0]} cannot be run ({error.strerror})")
    text = done.stdout.decode("utf-8", errors="replace").strip()
    if done.returncode:
        words = (done.stderr.decode("utf-8", errors="replace").strip() or text).splitlines()
        return Answer(fault=f"{command[0]}: {words[0] if words else 'fails without a word'}")
    return Answer(text)


class Known:
    """The machine, looked at once: programs of a cluster may take seconds."""

    machine: Machine | None = None

    @classmethod
    def at(cls, place: Path) -> Machine | None:
        """The machine with the room that there is now, if it was looked at.

        Args:
            place: a directory, which need not exist yet, on the disk that counts.
        """
        found = cls.machine
        return None if found is None else replace(found, disk_gib=free(place) / 2**30)


def look() -> Machine:
    """Look at the machine; a few seconds at most, and nothing is raised."""
    with ThreadPoolExecutor(3) as pool:
        slurm = pool.submit(find_slurm)
        gpus = pool.submit(_gpus)
        cuda = pool.submit(_cuda)
    found, fault = gpus.result()
    memory = psutil.virtual_memory()
    limit = min([memory.total, *memory_limits()])
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=limit / 2**30,
        available_gib=min(limit, memory.available) / 2**30,
        gpus=found,
        gpu_fault=fault,
        cuda=cuda.result(),
        token_in=find_token(os.environ),
        slurm=slurm.result(),
    )


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else os.uname().machine


def free(place: Path) -> int:
    """Free bytes on the disk of a directory, or of the nearest one above it that exists."""
    place = place.absolute()
    for directory in (place, *place.parents):
        try:
            return shutil.disk_usage(directory).free
        except OSError:
            continue  # it is not there yet, or not to be looked into
    return 0


def _gpus() -> tuple[tuple[FoundGpu, ...], str | None]:
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    answer = ask(query, NVIDIA_S)
    if answer.fault is not None:
        return (), answer.fault
    found = []
    for line in answer.text.splitlines():
        memory, comma, name = (part.strip() for part in line.partition(","))
        if comma:
            found.append(FoundGpu(name, int(memory) / 1024 if memory.isdigit() else None))
    return tuple(found), None if found else "nvidia-smi lists no GPU"


def _cuda() -> str | None:
    found = re.search(r"CUDA Version:\s*([\d.]+)", ask(["nvidia-smi"], NVIDIA_S).text)
    return found[1] if found else None


def find_token(environment: Mapping[str, str]) -> str | None:
    """Where huggingface_hub would find a token, by the rules that it documents; None: nowhere.

    Only the place is returned. A file's content is not read.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if environment.get(name, "").strip():
            return name
    home = environment.get("HF_HOME") or str(
        Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    path = Path(environment.get("HF_TOKEN_PATH") or str(Path(home) / "token")).expanduser()
    try:
        return str(path) if path.stat().st_size > 0 else None
    except OSError:
        return None


# Slurm.


@dataclass
class _Nodes:
    """What sinfo says of a partition, a line for each kind of node."""

    default: bool = False
    up: bool = False
    limit: str | None = None
    nodes: int = 0
    cores: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)


def find_slurm() -> Slurm | None:
    """Ask the cluster; None if Slurm is not installed here."""
    if shutil.which("sinfo") is None:
        return None
    user = getpass.getuser()
    questions = {
        "sinfo": ["sinfo", "--noheader", "--format", "%P|%a|%l|%D|%c|%m|%G"],
        "scontrol": ["scontrol", "--oneliner", "show", "partition"],
        "sacctmgr": [
            *("sacctmgr", "--noheader", "--parsable2", "show", "associations"),
            *(f"user={user}", "format=Account"),
        ],
    }
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = dict(
            zip(questions, pool.map(lambda q: ask(q, SLURM_S), questions.values()), strict=True)
        )
    if answers["sinfo"].fault is not None:
        return Slurm(fault=answers["sinfo"].fault)
    allowed = _allowed(answers["scontrol"].text)
    partitions = tuple(
        Partition(
            name=name,
            default=nodes.default,
            up=nodes.up,
            nodes=nodes.nodes,
            gpus=tuple(dict.fromkeys(nodes.gpus)),
            cores=min(nodes.cores, default=0),
            memory_gib=min(nodes.memory, default=0) / 1024,
            limit=nodes.limit,
            accounts=allowed.get(name),
        )
        for name, nodes in _partitions(answers["sinfo"].text).items()
    )
    lines = answers["sacctmgr"].text.splitlines()  # none without accounting
    accounts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return Slurm(partitions, accounts, None if partitions else "it has no partition")


def _partitions(text: str) -> dict[str, _Nodes]:
    found: dict[str, _Nodes] = {}
    for line in text.splitlines():
        parts = line.strip().split("|", 6)
        if len(parts) < 7:
            continue
        name, state, limit, count, cores, memory, gres = parts
        nodes = found.setdefault(name.removesuffix("*"), _Nodes())
        nodes.default |= name.endswith("*")
        nodes.up |= state == "up"
        nodes.limit = None if limit in ("infinite", "n/a") else limit
        nodes.nodes += _whole(count)
        nodes.cores.append(_whole(cores))
        nodes.memory.append(_whole(memory))
        nodes.gpus += list(_gpus_of(gres))
    return found


def _whole(text: str) -> int:
    """`64+` is 64 and more, for nodes that differ."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0


def _gpus_of(gres: str) -> Iterator[str]:
    """`gpu:h200:8(S:0-1),tmpdisk:1` holds `h200 × 8`."""
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        parts = entry.split(":")
        if parts[0] != "gpu":
            continue
        count = parts[-1] if len(parts) > 1 and parts[-1].isdigit() else "1"
        kind = parts[1] if len(parts) > 2 or (len(parts) == 2 and not parts[1].isdigit()) else "GPU"
        if count != "0":
            yield f"{kind} × {count}"


def _allowed(text: str) -> dict[str, tuple[str, ...]]:
    """Partition → accounts that may use it, where not all may."""
    found = {}
    for line in text.splitlines():
        entries = dict(entry.split("=", 1) for entry in line.split() if "=" in entry)
        accounts = entries.get("AllowAccounts", "ALL")
        if "PartitionName" in entries and accounts != "ALL":
            found[entries["PartitionName"]] = tuple(accounts.split(","))
    return found


def hours(limit: str | None) -> int | None:
    """Whole hours of a limit as Slurm writes it: `2-12:00:00`, `12:00:00`, `30:00` or `30`, in
    minutes; None if there is none, or it is shorter than an hour."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if found is None:
        return None
    days, first, _, third = found.groups()
    if days is not None:
        total = int(days) * 24 + int(first)
    elif third is not None:
        total = int(first)
    else:
        total = int(first) // 60
    return total or None
