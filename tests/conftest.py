"""Fixtures of the whole suite."""

from __future__ import annotations

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
    """A suite that a script has put into the background is started with SIGINT ignored, and so would be all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
