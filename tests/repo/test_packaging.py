"""The wheel: what it holds, and that it works away from the checkout."""

from __future__ import annotations

import os
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ms4 import pipeline_files
from ms4.errors import Ms4Error
from tests.commands import CHECKOUT, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    answer = run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, CHECKOUT),
        cwd=out,
    )
    assert answer.returncode == 0, answer.stdout
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, and of this one the packages that it depends on."""
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    (site,) = (root / "venv").glob("lib/python3.*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", root / "venv/bin/python")
    answer = run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=root, env=environment())
    assert answer.returncode == 0, answer.stdout
    # After its own site-packages, and as a plain entry: .pth files of ours are not followed there,
    # so that an editable install of ms4 stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_wheel_holds_the_pipeline_and_nothing_else_of_the_checkout(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    pipeline = {name.removeprefix("ms4/_pipeline/") for name in names if "_pipeline" in name}
    files = [CHECKOUT / "Snakefile"]
    for directory in ("rules", "profiles"):
        files += [path for path in (CHECKOUT / directory).rglob("*") if path.is_file()]
    assert pipeline == {path.relative_to(CHECKOUT).as_posix() for path in files}
    assert {"ms4/py.typed", "ms4_wizard/py.typed", "ms4/cli.py", "ms4/weights/hub.py"} <= names
    assert "ms4/weights/ordinary.txt" in names  # read by verify
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ms4", "ms4_wizard"}
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_needs_no_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        lines = archive.read(name).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist: ")]
    assert [line for line in needs if "torch" in line and "extra ==" not in line] == []
    assert any(line.startswith("Requires-Dist: snakemake<10") for line in needs)


def test_installed_wheel_finds_its_own_files(elsewhere: Path) -> None:
    program = (
        "import ms4, ms4_wizard\nfrom ms4 import pipeline_files\n"
        "print(ms4.__file__, ms4_wizard.__file__, pipeline_files.pipeline_directory(), sep='\\n')"
    )
    answer = run(elsewhere / "venv/bin/python", "-c", program, cwd=elsewhere, env=environment())
    assert answer.returncode == 0, answer.stdout
    for line in answer.stdout.splitlines():
        assert Path(line).is_relative_to(elsewhere / "venv"), line
    assert answer.stdout.splitlines()[2].endswith("ms4/_pipeline")


def test_installed_wheel_runs_the_pipeline(elsewhere: Path, project: Path) -> None:
    """The commands, and Snakemake on the files that the wheel carries; the checkout has no part."""
    binary = elsewhere / "venv/bin"
    schema = run(binary / "ms4", "schema", cwd=elsewhere, env=environment())
    assert schema.stdout == (CHECKOUT / "config/schema.json").read_text()
    (site,) = (elsewhere / "venv").glob("lib/python3.*/site-packages")
    pipeline = site / "ms4/_pipeline"
    for name in ("Snakefile", "rules", "profiles"):
        (project / name).rename(project / f"{name}.of-the-checkout")
        (project / name).symlink_to(pipeline / name)
    answer = run(
        *(binary / "python", "-m", "snakemake", "--profile", "local", "-n"),
        cwd=project,
        env=environment(),
    )
    assert answer.returncode == 0, answer.stdout
    assert "results/deliver.json" in answer.stdout


def test_installed_wheel_writes_a_project(elsewhere: Path, tmp_path: Path) -> None:
    """The wizard, screens' style sheet included, and a project that its Snakemake takes."""
    binary = elsewhere / "venv/bin"
    (site,) = (elsewhere / "venv").glob("lib/python3.*/site-packages")
    assert (site / "ms4_wizard/wizard.tcss").is_file()
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "answers.yaml").write_text(
        "{model: {source: tiny}, data: {train: [train.jsonl]}, run: {device: cpu}}"
    )
    write = (binary / "ms4-wizard", "--answers", "answers.yaml", "project")
    answer = run(*write, cwd=tmp_path, env=environment())
    assert answer.returncode == 0, answer.stdout
    dry_run = (binary / "python", "-m", "snakemake", "-n")
    answer = run(*dry_run, cwd=tmp_path / "project", env=environment())
    assert answer.returncode == 0, answer.stdout


def test_checkout_finds_the_checkouts_files() -> None:
    assert pipeline_files.pipeline_directory() == CHECKOUT


def test_broken_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_files, "__file__", str(tmp_path / "a/b/ms4/pipeline_files.py"))
    with pytest.raises(Ms4Error, match=r"this installation of ms4 is broken; install it again\.$"):
        pipeline_files.pipeline_directory()


def test_container_definition_builds_the_image_that_the_pipeline_names() -> None:
    definition = (CHECKOUT / "containers/ms4.def").read_text(encoding="utf-8")
    snakefile = (CHECKOUT / "Snakefile").read_text(encoding="utf-8")
    assert 'container: "containers/ms4.sif"' in snakefile
    assert "apptainer build containers/ms4.sif containers/ms4.def" in definition
    section = definition.split("%files\n")[1].split("\n\n")[0]
    for line in section.splitlines():
        source, target = line.split()
        assert (CHECKOUT / source).exists(), f"%files names {source}, which is not there"
        assert target == f"/opt/ms4/{source}"
