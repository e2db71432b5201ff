"""The documentation is true: its Python runs, its commands parse, its TOML is a job, its doctests pass."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from runs import python

import manyhands

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/architecture.md", "CONTRIBUTING.md", "benchmarks/README.md"]


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def _commands(page: str) -> list[str]:
    """Indented lines that begin with a command of ours."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^ {4}((?:manyhands|torchrun .* -m manyhands) .*)$", text, re.MULTILINE)
    return [re.sub(r"^torchrun .* -m ", "", line).split("  #")[0] for line in found]


@pytest.mark.parametrize("code", _blocks("README.md", "python"), ids=lambda c: c.strip().split("\n")[0])
def test_python_of_the_readme_runs_word_for_word(code: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("many hands make light work\n" * 3000)
    python("-c", code, cwd=tmp_path)


@pytest.mark.parametrize("code", _blocks("docs/architecture.md", "python"))
def test_python_of_the_architecture_page_compiles(code: str) -> None:
    compile(code, "architecture.md", "exec")


@pytest.mark.parametrize("text", _blocks("README.md", "toml"))
def test_toml_of_the_readme_is_a_job(text: str, tmp_path: Path) -> None:
    from manyhands.core import config
    from manyhands.train.job import Job

    path = tmp_path / "run.toml"
    path.write_text(text)
    job, _ = config.assemble(Job, [("run.toml", config.read_toml(str(path)))])
    assert job.data == ("corpus/*.txt",)


@pytest.mark.parametrize("line", [line for page in PAGES for line in _commands(page)])
def test_commands_of_the_documentation_parse(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from manyhands.cli import options
    from manyhands.cli import train as train_verb
    from manyhands.cli.main import VERBS

    verb, *arguments = shlex.split(line)[1:]
    assert verb in VERBS, line
    if verb == "train":
        (tmp_path / "run.toml").write_text("steps = 3\n")
        monkeypatch.chdir(tmp_path)
        arguments = [a for a in arguments if a not in ("OUTPUT/config.toml", "--resume", "OUTPUT")]
        train_verb.assemble(options.parse(train_verb.parser(), arguments))
    elif verb == "list":
        assert arguments


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def _modules() -> list[str]:
    """All that can be imported here: kernels for GPUs need what comes with PyTorch's builds for them."""
    without = ["__main__"] + ["quantize_triton"] * (importlib.util.find_spec("triton") is None)
    names = [m.name for m in pkgutil.walk_packages(manyhands.__path__, "manyhands.")]
    return [name for name in names if name.rpartition(".")[2] not in without]


@pytest.mark.parametrize("name", _modules())
def test_doctests(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


def test_every_module_says_what_it_is() -> None:
    for name in _modules():
        path = ROOT / Path(*name.split("."))
        module = importlib.import_module(name)
        if (module.__doc__ or "").strip() == "":
            assert path.is_dir(), f"{name} has no docstring"
            assert (path / "__init__.py").read_text().strip() == "", f"{name} has no docstring"


def _strategies_in(page: str) -> list[str]:
    """Call forms and bare names of strategies between backticks, without those that list a method's parameters."""
    from manyhands.core.registry import REGISTRY

    found = re.findall(r"`([a-z0-9-]+(?:\([^`]*\))?)`", (ROOT / page).read_text())
    named = [text for text in found if text.partition("(")[0] in REGISTRY["strategies"]]
    return sorted({t for t in named if "(" not in t or ("=" in t and "…" not in t)})


@pytest.mark.parametrize("text", _strategies_in("docs/methods.md"))
def test_strategies_of_the_methods_page_are_values(text: str) -> None:
    from manyhands.core import config
    from manyhands.strategy.base import Strategy

    assert isinstance(config.from_text("strategies", text), Strategy)


def test_the_methods_page_knows_every_strategy() -> None:
    from manyhands.core.registry import REGISTRY

    text = (ROOT / "docs/methods.md").read_text()
    assert [name for name in REGISTRY["strategies"] if f"`{name}" not in text and name[:4] != "zero"] == []
