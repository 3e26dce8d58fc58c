"""Projects for tests, as the wizard writes them, with the demo's data inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ms4 import config
from ms4_wizard import emit, project
from ms4_wizard.answers import Answers


def write_project(root: Path, values: Mapping[str, Any]) -> Path:
    """Write the project of a configuration's values, whose paths are relative to it."""
    answers = config.check(values, "the test's answers", model=Answers)
    project.write_project(root, emit.project_files(answers), answers.where)
    return root
