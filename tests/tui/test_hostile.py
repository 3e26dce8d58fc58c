"""Text that would be code if it were pasted into a shell line, YAML or a Snakefile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4 import config
from ms4.errors import Ms4Error
from ms4_wizard import writing
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft
from ms4_wizard.project import read_project
from ms4_wizard.steps import STEPS
from tests.commands import snakemake
from tests.examples import examples

WORDS = (
    *(
        "$(touch pwned)",
        "`touch pwned`",
        "${HOME}",
        "; touch pwned;",
        "| tee pwned",
        "&& touch pwned",
    ),
    *("'", '"', "'''", '"""', "\\", "\\n", "\n", "\r\n", "\t", " ", "  ", "\x85", "\u2028", "\x07"),
    *("{wildcards}", "{input}", "{x,.*}", "{{", "}}", "{", "}", "{config[a]}", "%s", "%(a)s"),
    *(
        "!!python/object/apply:os.system",
        "!!binary",
        "&anchor",
        "*alias",
        "<<: *a",
        "? ",
        "- ",
        ": ",
    ),
    *(
        "#",
        " #",
        "---",
        "...",
        "|",
        ">",
        "@",
        "`",
        "%YAML",
        "null",
        "true",
        "~",
        "0x10",
        "1e5",
        "=",
        "-rf",
    ),
    *(
        "--config",
        "s3://x",
        "http://x",
        "ünï",
        "☃",
        "名",
        "\u202e",
        "e\u0301",
        "import os",
        "\nrule x:",
    ),
)
HOSTILE = st.lists(
    st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    min_size=1,
    max_size=4,
).map("".join)
# The names of files: no `/`, no NUL, and not too long for a file system.
NAMES = HOSTILE.map(lambda text: text.replace("/", "").replace("\0", "")).filter(
    lambda name: 0 < len(os.fsencode(name)) <= 200 and name not in (".", "..", "~")
)
GPU = {"run": {"device": "cuda", "memory_gib": 79}}
LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def make(place: Path, names: list[str], source: str) -> tuple[Answers, Path]:
    """A project of hostile answers."""
    for name in names:
        (place / name).write_text(LINE)
    answers = Answers.model_validate(
        {
            "model": {"source": source},
            "data": {"train": names, "test": {"held-out": names[0]}},
            **GPU,
        }
    )
    project = place / "project"
    writing.write_from_answers(answers, project)
    return answers, project


def check(place: Path, project: Path, names: list[str], source: str) -> None:
    loaded = config.load(project / "config/config.yaml")
    found = [Path(os.path.normpath(project / path)) for path in loaded.data.train]
    assert found == [Path(os.path.normpath(place / name)) for name in names]
    assert loaded.model.source == source
    # Only the keys that were meant: a plain YAML reader sees the same structure.
    plain = yaml.safe_load((project / "config/config.yaml").read_text(encoding="utf-8"))
    assert plain == loaded.model_dump(mode="json")


@settings(deadline=None, max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    source=HOSTILE.map(lambda text: "owner/" + text.replace("/", "").replace("\0", "")),
)
def test_hostile_answers_come_through(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], source: str
) -> None:
    place = tmp_path_factory.mktemp("hostile")
    before = Path.cwd()
    os.chdir(place)
    try:
        answers, project = make(place, names, source)
        check(place, project, names, source)
        read = read_project(project)
        # What might be taken for a home directory has `./` before it.
        assert read.data.train == tuple(f"./{n}" if n.startswith("~") else n for n in names)
        assert read.model == answers.model
        again = Draft.of(read)
        for question in [q for step in STEPS for q in step.questions if not q.choices]:
            if again.can_be_typed(question):
                again.answer(question, again.text(question))
        assert again.check()[0] == read, "typed as it is shown"
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_snakemake_takes_them_as_they_are(place: Path) -> None:
    """All of the words as names of data files, in one project: it lints, parses, dry-runs."""
    names = sorted({f"{n} {word}".replace("/", "∕") for n, word in enumerate(WORDS)})
    names += [word.replace("/", "∕") for word in WORDS if word.strip() and word not in ("~",)]
    source = "owner/$(touch pwned) `touch pwned` {wildcards.x} {input} '\"\n"
    _, project = make(place, names, source)
    check(place, project, names, source)
    for options in (["-n"], ["--lint"], ["--profile", "local", "-n"], ["--profile", "slurm", "-n"]):
        answer = snakemake(*options, cwd=project)
        assert answer.returncode == 0, answer.stdout
    shell = "Shell command: ms4 preprocess --config config/config.yaml"
    assert shell in snakemake("-n", cwd=project).stdout
    assert list(place.rglob("pwned")) == []


@pytest.mark.slow
def test_a_job_reads_them(place: Path, checkpoint: Path) -> None:
    """The files lie in the project, so that each word stands first in its path."""
    names = sorted({word.replace("/", "∕") for word in WORDS if word.strip() and word != "~"})
    writing.write_from_answers(
        Answers.model_validate({"data": {"train": ["train.jsonl"]}} | GPU), Path("p")
    )
    for name in names:
        (place / "p" / name).write_text(LINE)
    values = {"model": {"source": str(checkpoint)}, "data": {"train": names}} | GPU
    os.chdir("p")
    writing.write_from_answers(Answers.model_validate(values), Path())
    answer = snakemake("--cores", "1", "results/data.json", cwd=place / "p")
    assert answer.returncode == 0, answer.stdout
    made = json.loads((place / "p/results/data.json").read_text())
    assert made["train"]["samples"] == len(names)
    assert list(place.rglob("pwned")) == []


@pytest.mark.slow
def test_a_change_in_a_file_with_braces_is_seen(place: Path) -> None:
    """Snakemake cannot have it as an input; its hash does the same."""
    _, project = make(place, ["{input}.jsonl", "plain.jsonl"], "tiny")
    outputs = ["weights/source.json", "results/data.json"]
    for name in outputs:
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("{}")
    snakemake("--cores", "1", "--touch", "--forceall", *outputs, cwd=project)
    answer = snakemake("-n", "results/data.json", cwd=project)
    assert "Nothing to be done" in answer.stdout, answer.stdout
    (place / "{input}.jsonl").write_text(LINE * 2)
    answer = snakemake("-n", "results/data.json", cwd=project)
    assert "rule preprocess" in answer.stdout
    assert "Params have changed" in answer.stdout


@pytest.mark.parametrize("field", ["where.partition", "where.account"])
@pytest.mark.parametrize(
    "name", ["$(x)", "a b", "a'", "__import__('os')", "-x", "a\n", "", "{a}", "é"]
)
def test_slurm_names_are_refused(place: Path, field: str, name: str) -> None:
    """Snakemake evaluates them: what is no plain name is refused, and nothing is written."""
    draft = Draft({"data": {"train": ["train.jsonl"]}})
    draft.set(field, name)
    with pytest.raises(Ms4Error, match=field):
        config.check(draft.values, "answers", model=Answers)


@pytest.mark.parametrize("name", ["a b", "{x}", "-n", "a.b", "$(x)", "", "x" * 33, "a\nb"])
def test_names_of_sets_are_refused(name: str) -> None:
    with pytest.raises(Ms4Error, match=r"data\.test"):
        config.check({"data": {"train": ["a"], "test": {name: "b"}}}, "answers", model=Answers)
