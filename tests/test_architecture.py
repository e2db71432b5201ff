"""The floors: imports go down, never up, never round in a circle; the package's root starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "manyhands"
FLOORS = {
    "core": 0,
    "wire": 1,
    "balance": 1,
    "data": 1,
    "coordinate": 1,
    "exchange": 2,
    "cadence": 2,
    "placement": 2,
    "tasks": 2,
    "models": 2,
    "strategy": 3,
    "train": 4,
    "serve": 4,
    "api": 4,
    "launch": 5,
    "cli": 5,
    "__main__": 5,
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, *, lazy: bool) -> set[str]:
    """Modules of this package that a file imports; without `lazy`, only those that run when it is imported."""
    found: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            deferred = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                if lazy:
                    visit(child, True)
                continue
            if lazy or not deferred:
                if isinstance(child, ast.Import):
                    found.update(a.name for a in child.names)
                elif isinstance(child, ast.ImportFrom) and child.module and child.level == 0:
                    found.add(child.module)
                    found.update(f"{child.module}.{a.name}" for a in child.names)
                assert not (isinstance(child, ast.ImportFrom) and child.level), f"{path}: relative import"
            visit(child, deferred)

    visit(ast.parse(path.read_text()), False)
    return {name for name in found if name.split(".")[0] == "manyhands"}


def _floor(module: str) -> int | None:
    parts = module.split(".")
    return FLOORS[parts[1]] if len(parts) > 1 else None


def test_every_module_has_a_floor() -> None:
    for module in _modules():
        if module != "manyhands":
            _floor(module)


def test_imports_go_down_only() -> None:
    known = _modules()
    for module, path in known.items():
        if module == "manyhands":
            continue  # the root re-exports lazily, from any floor
        for target in _imports(path, lazy=True) & set(known):
            if target == "manyhands":
                continue
            mine, theirs = _floor(module), _floor(target)
            assert mine is not None
            assert theirs is not None
            assert theirs <= mine, f"{module} (floor {mine}) imports {target} (floor {theirs})"
            if module.startswith("manyhands.exchange"):
                assert target.split(".")[1] in ("core", "exchange"), (
                    f"{module} imports {target}: exchanges know only core"
                )
            if {module.split(".")[1], target.split(".")[1]} in (
                {"wire", "data"},
                {"tasks", "models"},
                {"cadence", "exchange"},
            ):
                raise AssertionError(f"{module} imports its neighbour {target}")


def test_no_import_is_circular() -> None:
    known = _modules()
    graph = {module: _imports(path, lazy=False) & set(known) - {module} for module, path in known.items()}
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                if target != "manyhands":
                    walk(target, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])


def test_core_knows_no_process_group() -> None:
    for path in (PACKAGE / "core").glob("*.py"):
        assert "import torch.distributed" not in path.read_text(), path
        assert "from torch.distributed" not in path.read_text(), path


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys; from manyhands.cli.main import main; from manyhands.cli.train import parser; parser().format_help();"
        "heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'rich', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exported_names_exist() -> None:
    import manyhands

    for name in manyhands.__all__:
        assert getattr(manyhands, name) is not None


def test_every_registered_name_resolves_and_has_help() -> None:
    from manyhands.core import registry

    for kind, names in registry.REGISTRY.items():
        for name in names:
            assert registry.resolve(kind, name) is not None
            assert 10 < len(registry.help_of(kind, name)) < 110


def test_files_fit_in_the_head() -> None:
    for path in PACKAGE.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 420, f"{path}: {lines} lines"
