"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet import Fleet

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-goldens", action="store_true", help="write tests/goldens anew instead of comparing"
    )


def pytest_configure() -> None:
    """A suite that a script has put into the background is started with SIGINT ignored, and so would be all that it starts.

    And beside another part of the suite, threads that wait for work by spinning would keep its cores.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "test_train",
    "test_elastic",
    "test_strategies_run",
    "test_launch",
    "test_serve_train",
    "test_chaos",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where files run side by side, none is left alone at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of public data sets beside the project; tests that use it skip where it is absent."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"public data sets are not at {path}")
    return path


@pytest.fixture(scope="session")
def fleets() -> Iterator[Callable[[int, str], Fleet]]:
    """`fleets(size, transport)`: real workers, started on first use and kept for the session."""
    made: dict[tuple[int, str], Fleet] = {}

    def get(size: int, transport: str = "shared") -> Fleet:
        if (size, transport) not in made:
            made[size, transport] = Fleet(size, transport)
        return made[size, transport]

    yield get
    for fleet in made.values():
        fleet.close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data of tests goes to a directory of the run, never to the user's cache."""
    monkeypatch.setenv("MANYHANDS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of five hundred lines."""
    rng = random.Random(3)
    words = ["hand", "many", "light", "work", "makes", "slow", "fast", "exact"]
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text("".join(" ".join(rng.choice(words) for _ in range(9)) + "\n" for _ in range(500)))
    return path
