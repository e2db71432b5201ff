"""Third parties' packages for tests: a module and its metadata in a directory, found as what pip installs is."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    directory: Path, name: str, source: str, points: Mapping[str, str], patch: pytest.MonkeyPatch
) -> None:
    """Put module `name` with its entry points ("tasks.mine" → "Mine") where this test's processes find it."""
    (directory / f"{name}.py").write_text(textwrap.dedent(source))
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for point, attribute in points.items():
        kind, _, label = point.partition(".")
        lines.append(f"[manyhands.{kind}]\n{label} = {name}:{attribute}\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    here = str(Path(__file__).resolve().parents[1])
    before = os.environ.get("PYTHONPATH", here)
    patch.setenv("PYTHONPATH", os.pathsep.join([str(directory), before]))
