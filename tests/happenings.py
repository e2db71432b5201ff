"""What a job may tell: one event of each kind, as wide as they get."""

from __future__ import annotations

from typing import Any

from manyhands.core import events as e


def stepped(step: int = 2402, **changes: Any) -> e.Stepped:
    """Figures about as wide as they get."""
    figures: dict[str, Any] = {
        "step": step,
        "total_steps": 12_000,
        "epoch": 0.1,
        "loss": 10.8231,
        "lr": 6e-4,
        "grad_norm": 123.45,
        "samples": 10,
        "target_tokens": 640,
        "tokens_per_s": 123_456.0,
        "mfu": 0.417,
        "communicate_share": 0.123,
        "memory_bytes": 12_345_678_901,
        "eta_s": 86_399.0,
    }
    return e.Stepped(**{**figures, **changes})


def balance(slowest: str = "w1", workers: int = 3) -> e.Balance:
    loads = [
        e.Load(
            seat=f"w{i}",
            rank=i,
            host="node-1",
            rows=100 + i,
            compute_s=2.0 if f"w{i}" == slowest else 1.0,
            wait_s=0.0 if f"w{i}" == slowest else 0.9,
            data_s=0.02,
            network_s=0.08,
        )
        for i in range(workers)
    ]
    reason = "compute" if slowest else ""
    return e.Balance(step=2402, wall_s=2.1, workers=loads, slowest=slowest, reason=reason)


def membership() -> list[e.Event]:
    who: dict[str, Any] = {"rank": 2, "host": "node-1"}
    stack = "loop.py:120 in run\nreplica.py:80 in step"
    lost: dict[str, Any] = {"seat": "w2", "phase": "step", "step": 2403, **who}
    return [
        e.Redivided(step=2402, shares=(8, 4, 4), rows_per_s=(20.1, 10.2, 9.9)),
        balance(),
        e.Lost(how="hang", detail="no heartbeat", stack=stack, silent_s=10.2, **lost),
        e.Reformed(epoch=2, workers=2, step=2403, wall_s=0.41, kept_places=5, redone_places=3),
        e.Joined(seat="w2-1", step=2404, size_bytes=15 << 20, wall_s=0.8, **who),
        e.Mended(seat="w1", step=2500, what="parameters", source="w0", size_bytes=5 << 20, wall_s=0.2, **who),
        e.Aligned(step=2500, ranks=(1,), drift=3.1e-9, size_bytes=5 << 20, wall_s=0.1),
        e.Left(seat="w1", step=2501, detail="asked to by SIGTERM", **who),
    ]


def job() -> list[e.Event]:
    """One event of each class and more, in the order of a job, with texts that mean something to a terminal."""
    return [
        e.Planned(
            rows=[
                ("model", "gpt2-small, 124,439,808 parameters, 12 layers, 768 wide, 12 heads", "--model"),
                ("data", "corpus/[bold]*.txt: 1,234 files → 5.6 GiB", "--data"),
                ("precision", "bf16", "default: this CPU has bf16 units (avx512_bf16, amx_bf16)"),
            ]
        ),
        *(
            e.Preparing(done_bytes=i * 30_000_000, total_bytes=100_000_000, tokens=i * 7_000_000)
            for i in range(3)
        ),
        e.Preparing(done_bytes=5, total_bytes=None, tokens=1, phase="train tokenizer"),
        e.PreparedData(
            directory="d", documents=3, tokens=9, text_bytes=20, skipped=1, reused=False, wall_s=1.5
        ),
        e.Resumed(step=2400, path="run/checkpoint-2400", from_workers=2, workers=3),
        stepped(2401),
        e.Warned(message="the disk is nearly full", where="rank 0"),
        e.Saved(step=2401, path="run/checkpoint-2401", size_bytes=1_500_000_000, wall_s=3.2, blocked_s=0.4),
        stepped(2402),
        *(e.Evaluating(done=i, total=40) for i in (10, 20)),
        e.Evaluated(step=2402, metrics={"loss": 3.21, "bits_per_byte": 1.19}, wall_s=4.2),
        *membership(),
        stepped(12_000),
        e.Sampled(step=12_000, prompt="def ", text="f():\n\treturn :smile: [red]no\x1b[2J\x07\u202e é\ud800"),
        e.Served(consistency="bounded(4)", updates=9, discarded=1, staleness={"0": 7, "3": 2}),
        e.Finished(step=12_000, reason="done", wall_s=7300, summary="run/summary.json"),
    ]
