"""``OUTPUT/summary.json``: what a finished (or stopped) run did. Others read it: tests/contract.py freezes it.

`steps`, `samples`, `target_tokens` and `skipped_steps` are the whole run's, `wall_s`, `train_s` and the rates those of the last
command, which went on after step `resumed_from`; each of `workers` tells what its process did. So, where nobody was lost and
nothing resumed, the workers' samples add up to the run's.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from manyhands.core import config, hardware
from manyhands.train.material import as_data

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from manyhands.train.job import Job
    from manyhands.train.loop import Loop
    from manyhands.train.material import Material
    from manyhands.train.plan import Facts, Plan

FORMAT = 1


def summarize(
    job: Job,
    loop: Loop,
    facts: Facts,
    plan: Plan,
    material: Material,
    reason: str,
    world_sizes: Sequence[int],
    wall_s: float,
    *,
    collective: bool,
) -> dict[str, Any]:
    """The summary as JSON data. Rates count training steps alone, not preparation, evaluation or compiling's first step.

    Args:
        collective: whether the other workers take part; after an interruption they may be gone, and then only this
            worker's own figures are listed.
    """
    from manyhands.train import session
    from manyhands.train.checkpoint import sha256_of_parameters

    replica, tally = loop.replica, loop.tally
    mine = worker_figures(loop)
    workers = loop.world.gather(mine) if collective else [mine]
    weights = session.whole_weights(replica, collective=collective)
    rate = tally.rate
    name = job.model if job.model != "auto" else material.default_model
    return {
        "format": FORMAT,
        "reason": reason,
        "resumed_from": tally.resumed_from,
        "steps": replica.steps,
        "samples": loop.feed.order.seen(replica.steps),
        "target_tokens": replica.tokens,
        "skipped_steps": replica.skipped,
        "wall_s": wall_s,
        "train_s": tally.train_s,
        "tokens_per_s": rate,
        "mfu": rate * facts.flops_per_token / facts.peak_flops if facts.peak_flops else None,
        "flops_per_token": facts.flops_per_token,
        "peak_flops": facts.peak_flops,
        "train_loss": tally.train_loss,
        "eval": tally.eval,
        "strategy": config.to_data(job.strategy, "strategies"),
        "world_sizes": list(world_sizes),
        "model": {"name": name, "parameters": facts.parameters},
        "data": as_data(material),
        "precision": plan.precision,
        "compile": plan.compile,
        "parameters_sha256": sha256_of_parameters(weights) if weights is not None else None,
        "machine": hardware.machine_facts(),  # of the whole machine, also where this worker has a core of its own
        "workers": workers,
        **served_figures(loop),
    }


def kept(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary that `path` holds of a run that was at its end already, with the new scores; `summary` where it holds none."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before.get(key) == summary[key] for key in ("format", "steps", "parameters_sha256"))
    except (OSError, ValueError, AttributeError):
        return summary
    return {**before, "reason": summary["reason"], "eval": summary["eval"]} if same else summary


def served_figures(loop: Loop) -> dict[str, Any]:
    """What parameter servers say of themselves, on rank 0 where there are some: ``served``."""
    figures = getattr(loop.replica.method, "figures", None)
    return {"served": figures()} if figures is not None and loop.world.rank == 0 else {}


def worker_figures(loop: Loop) -> dict[str, Any]:
    """This worker's row of ``workers``."""
    traffic, tally = loop.replica.wire.traffic, loop.tally
    return {
        "rank": loop.world.rank,
        "host": socket.gethostname(),
        "device": str(loop.feed.device),
        "samples": tally.samples,
        "tokens": tally.tokens,
        "compute_s": tally.compute_s,
        "communicate_s": traffic.communicate_s,
        "idle_s": traffic.idle_s,
        "sent_bytes": traffic.sent_bytes,
        "received_bytes": traffic.received_bytes,
    }
