"""From answers to the files of a project.

The same answers give the same bytes. A user's text goes through the YAML writer and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ms4 import config
from ms4.data import sources
from ms4.errors import Ms4Error
from ms4.pipeline_files import pipeline_directory
from ms4_wizard import costs, explain, readme
from ms4_wizard.answers import Answers
from ms4_wizard.costs import Cost

CONFIG = "config/config.yaml"
SLURM = "profiles/slurm/config.yaml"
REQUEUE = "slurm-requeue: true"
"""The line of the Slurm profile that makes every job one that Slurm puts back into its queue."""
NO_REQUEUE = "--no-requeue"
"""The opposite, which the executor has no setting for."""
IGNORED = (
    *("weights/", "data/packed/", "data/faults.txt", "checkpoints/", "results/", "locks/"),
    *("logs/", ".snakemake/"),
)
"""What a run leaves behind: not for version control."""


def relocate(answers: Answers, start: Path, project: Path) -> Answers:
    """The answers with relative paths made relative to another directory; absolute ones stay.

    Args:
        answers: with paths relative to `start`.
        start: for a new project, the directory that the wizard was started in.
        project: the directory that the paths are to be relative to.
    """

    def moved(text: str) -> str:
        if sources.is_hub(text):
            return text
        path = config.expand_home(text)
        if path.is_absolute():
            return str(path)
        # Directories are resolved: `..` after a link leads elsewhere than its text says. The file
        # itself may be a link, and stays one.
        real = (start / path).parent.resolve() / path.name
        relative = os.path.relpath(real, project.resolve())
        return f"./{relative}" if relative.startswith("~") else relative

    data = answers.data.model_copy(
        update={
            "train": tuple(moved(path) for path in answers.data.train),
            "test": {name: moved(path) for name, path in answers.data.test.items()},
            "weights": {moved(path): weight for path, weight in answers.data.weights.items()},
            "images": answers.data.images.model_copy(
                update={"roots": tuple(moved(path) for path in answers.data.images.roots)}
            ),
        }
    )
    model = answers.model
    local = answers.resolve_source(start)
    if local is not None:
        source = moved(str(local))
        # With a leading dot it cannot be mistaken for a hub id.
        source = source if source.startswith((".", "/")) else f"./{source}"
        model = model.model_copy(update={"source": source})
    return answers.model_copy(update={"data": data, "model": model})


def missing_data(answers: Answers, base: Path) -> dict[str, str]:
    """The data files that are not there or cannot be read: question's field → what is wrong.

    Args:
        answers: with paths relative to `base`.
        base: a directory.
    """
    faults: dict[str, list[str]] = {}
    for name in answers.data.train:
        faults.setdefault("data.train", []).extend(_missing(base, name))
    for label, name in answers.data.test.items():
        faults.setdefault("data.test", []).extend(f"{label}: {x}" for x in _missing(base, name))
    return {field: "; ".join(found) for field, found in faults.items() if found}


def _missing(base: Path, name: str) -> Iterator[str]:
    try:
        name.encode()  # a name of other bytes can be in no configuration file
        if sources.is_hub(name):
            sources.expand([name])
            return
        if sources.matches(name, base):
            return
        path = base / config.expand_home(name)
        if not path.is_file():
            yield f"no such file: {name}"
        elif not os.access(path, os.R_OK):
            yield f"cannot be read: {name}"
    except Ms4Error as error:
        yield str(error)
    except UnicodeEncodeError:
        yield f"its name is not UTF-8; rename it: {name!a}"
    except (OSError, ValueError) as error:
        yield f"cannot be read: {name} ({getattr(error, 'strerror', None) or error})"


def check_data(answers: Answers, base: Path) -> None:
    """Check that the data files are there.

    Raises:
        Ms4Error: names each that is missing or cannot be read.
    """
    faults = missing_data(answers, base)
    if faults:
        lines = [f"{field}: {message}" for field, message in faults.items()]
        raise Ms4Error("\n".join([*lines, f"Relative paths are relative to {base}."]))


def project_files(answers: Answers, found: Cost | None = None) -> dict[str, str]:
    """The files of the project of these answers (whose paths are relative to it): path → text.

    Args:
        answers: with paths relative to the project.
        found: their plan, as `costs.standing` makes it of them; None: it is made here, where a
            local model must be found from the current directory.
    """
    found = costs.standing(answers) if found is None else found
    pipeline = pipeline_directory()
    names = [Path("Snakefile"), *(f.relative_to(pipeline) for f in pipeline.glob("rules/*.smk"))]
    names += [f.relative_to(pipeline) for f in pipeline.glob("profiles/*/config.yaml")]
    files = {str(name): (pipeline / name).read_text(encoding="utf-8") for name in sorted(names)}
    files[SLURM] = _slurm_profile(files[SLURM], answers)
    files[CONFIG] = config.dump(answers.configuration(), explain.notes(answers, found))
    files["config/schema.json"] = config.json_schema()
    files["README.md"] = readme.readme(answers, found)
    files[".gitignore"] = "".join(f"/{name}\n" for name in IGNORED)
    return files


def _slurm_profile(text: str, answers: Answers) -> str:
    """The Slurm profile with the cluster's names, in the place of its commented examples."""
    where = answers.where
    names = {
        "slurm_account": where.account,
        "slurm_partition": where.partition,
        "slurm_extra": NO_REQUEUE if where.requeue == "never" else None,
    }
    if where.requeue == "always":
        text = text.replace(f"\n# {REQUEUE}\n", f"\n{REQUEUE}\n")
    # Quoted: Snakemake evaluates these as Python, and a name like `input` means something there.
    defaults = [f"{key}='{name}'" for key, name in names.items() if name is not None]
    resources = [f"train:runtime={60 * where.hours}"] if where.hours is not None else []
    for key, entries in (("default-resources", defaults), ("set-resources", resources)):
        if not entries:
            continue
        lines = text.splitlines()
        first = lines.index(f"# {key}:")
        last = first + 1
        while last < len(lines) and lines[last].startswith("#   - "):
            last += 1
        lines[first:last] = [f"{key}:", *(f"  - {entry}" for entry in entries)]
        text = "\n".join(lines) + "\n"
    return text
