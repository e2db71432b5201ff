"""What the comparison of methods makes of its samples: shares, bytes, losses and times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import methods_report

    return methods_report


def _strategy(report: Any, name: str) -> str:
    return str({m.name: m for m in report.catalogue("python")}[name].strategy)


def _speed(report: Any, name: str, rate: str, tokens_per_s: float, sent: float, others: float = 0.0) -> Any:
    return {
        "method": name,
        "strategy": _strategy(report, name),
        "workers": 2,
        "rate": rate,
        "tokens_per_s": tokens_per_s,
        "sent_bytes_per_step": [sent, sent / 2],
        "others_share": others,
    }


def _loss(report: Any, name: str, seed: int, evaluations: list[list[float]]) -> Any:
    return {
        "method": name,
        "strategy": _strategy(report, name),
        "workers": 2,
        "size": "small",
        "seed": seed,
        "steps": 20,
        "tokens": 2000,
        "eval_loss": evaluations[-1][1],
        "evaluations": evaluations,
    }


@pytest.fixture
def data(report: Any) -> dict[str, Any]:
    return {
        "machine": {"cpu": "one", "cores": 2, "versions": {"torch": "2"}},
        "rates": [
            _speed(report, "no communication", "none", 1000, 0),
            _speed(report, "PyTorch, no communication", "none", 800, 0),
            _speed(report, "PyTorch DDP", "100mbit", 80, 2e6),
            _speed(report, "PyTorch DDP, bf16 hook", "100mbit", 160, 1e6),
            _speed(report, "sparseloco", "100mbit", 900, 1e3),
            _speed(report, "sparseloco", "100mbit", 950, 1e3),
            _speed(report, "sparseloco", "100mbit", 100, 1e3, others=0.5),  # measured on a busy machine
        ],
        "quality": [
            _loss(report, "ddp", 0, [[10, 6.0], [20, 4.0]]),
            _loss(report, "ddp", 1, [[10, 6.0], [20, 4.2]]),
            _loss(report, "sparseloco", 0, [[10, 5.0], [20, 4.0]]),
            _loss(report, "powersgd", 0, [[10, 6.0], [20, 5.0]]),
        ],
    }


def test_figures_of_samples(report: Any, data: dict[str, Any]) -> None:
    results = report.Results(data)
    assert results.speed("sparseloco", 2, "100mbit") == 925
    assert results.share("sparseloco", 2, "100mbit") == pytest.approx(0.925)
    assert results.share("PyTorch DDP", 2, "100mbit") == pytest.approx(0.1)
    assert results.sent("PyTorch DDP, bf16 hook", 2) / results.sent("sparseloco", 2) == 1000
    assert results.against("ddp") == 0
    assert results.against("sparseloco") == 0  # over seed 0 alone, which both have
    assert results.against("powersgd") == pytest.approx(0.25)


def test_tokens_to_a_common_loss(report: Any, data: dict[str, Any]) -> None:
    results = report.Results(data)
    assert results.target() == pytest.approx(1.01 * 4.1)
    assert results.tokens_to("sparseloco", 4.5) == pytest.approx(1500)
    assert results.tokens_to("sparseloco", 5.5) == pytest.approx(1000)
    assert results.tokens_to("powersgd", 4.5) is None


def test_table_and_plot(
    report: Any, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "methods.json").write_text(json.dumps(data))
    report.write(tmp_path / "methods")
    text = (tmp_path / "methods.md").read_text()
    assert "| method | 100 Mbit/s | kB/step |" in text, "what was measured"
    assert "| sparseloco | 925 (92%) | 1 | 1e+03 × |" in text
    assert "| powersgd | not reached |" in text
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out
