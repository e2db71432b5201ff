"""What balancing costs where all are equal: blocks of steps with it and without, in turn within one run of two workers.

    python benchmarks/balance_equal.py [--pairs 40] [--block 8]

Two workers with a core each, started by the launcher as `manyhands train` starts its own, train one replica through the main
job's feed. In a block *off* each has half of the global batch; in a block *auto* the shares are the balancer's, which
observes every step of these blocks and of no other. So both meet the same machine within seconds, and whatever balancing
does (deciding, and following noise) is in the ratio off / auto of neighbouring blocks, which come first in turn.

Writes ``results/balance_equal.json``: every block, the median of the ratios with a 95% interval from their order statistics.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import balance
import harness
from efficiency import summary

ROWS = 32  # of a step
WARMUP = 2  # pairs of blocks


def work(argument: str) -> int:
    """Entry point of a worker."""
    import torch
    from transformers import AutoModelForCausalLM

    from manyhands.balance.balancer import Balancer
    from manyhands.core import compute
    from manyhands.core.native import enable_allocator
    from manyhands.data.rows import TokenRows
    from manyhands.data.sample import Order
    from manyhands.strategy import presets
    from manyhands.tasks.pretrain import Pretrain
    from manyhands.train import session
    from manyhands.train.balancing import rebalance
    from manyhands.train.feed import Feed
    from manyhands.train.forward import quicken
    from manyhands.train.job import Job
    from manyhands.train.material import prepare_job
    from manyhands.train.replica import Replica

    given = json.loads(argument)
    place = Path(given["work"])
    enable_allocator()
    compute.enable()
    world, _ = session.connect_from_environment(device="cpu")
    job = Job(tokenizer=f"bpe:{balance.VOCABULARY}", cache=str(place / "prepared"), seq_len=balance.SEQ_LEN)
    rows = TokenRows(prepare_job(job, processes=1)[0], balance.SEQ_LEN)
    model = AutoModelForCausalLM.from_pretrained(place / "init").train()
    quicken(model)
    replica = Replica(
        model,
        presets.ddp(lr=3e-4, weight_decay=0.1, schedule="constant"),
        world.wire,
        max_grad_norm=1.0,
        targets_per_row=balance.SEQ_LEN,
    )
    equal = (ROWS // 2, ROWS // 2)
    feed = Feed(
        rows=rows,
        order=Order(len(rows), ROWS, 0),
        rank=world.rank,
        weights=equal,
        micro_batch=1,
        device_batch=8,
        coalesce=True,
        device=torch.device("cpu"),
        seed=0,
    )
    balancer = Balancer(["w0", "w1"], n_units=ROWS)
    changes: list[Any] = []
    loss = Pretrain().loss

    def block(*, auto: bool) -> float:
        feed.weights = balancer.weights if auto else equal
        begun = time.perf_counter()
        for _ in range(given["block"]):
            result = replica.step(feed.part(replica.steps), loss)
            rebalance(balancer if auto else None, feed, result, replica.steps, changes.append)
        return time.perf_counter() - begun

    found = []
    for pair in range(WARMUP + given["pairs"]):
        seconds = {}
        for auto in (pair % 2 == 0, pair % 2 == 1):
            seconds["auto" if auto else "off"] = block(auto=auto)
        if pair == WARMUP - 1:
            changes.clear()
        if pair >= WARMUP:
            found.append(seconds)
    if world.rank == 0:
        told = [{"step": each.step, "shares": list(each.shares)} for each in changes]
        Path(given["answer"]).write_text(json.dumps({"pairs": found, "changes": told}))
    replica.close()
    world.wire.close()
    return 0


def main() -> int:
    from manyhands.core.hardware import cache_directory
    from manyhands.launch.local import launch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=40, help="of blocks")
    parser.add_argument("--block", type=int, default=8, help="steps in a block")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks" / "balance")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "balance_equal.json")
    given = parser.parse_args()
    balance.make(given.work.resolve())
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        argument = {
            "work": str(given.work.resolve()),
            "pairs": given.pairs,
            "block": given.block,
            "answer": str(answer),
        }
        code = launch("balance_equal:work", json.dumps(argument), workers=2, output=Path(scratch), threads=1)
        if code:
            return code
        found = json.loads(answer.read_text())
    ratio = summary([pair["off"] / pair["auto"] for pair in found["pairs"]])
    print(f"balanced over not: {ratio['median']:.4f} (95%: {ratio['low']:.4f} to {ratio['high']:.4f})")
    print(f"{len(found['changes'])} changes of shares")
    data = {
        "command": f"python benchmarks/balance_equal.py --pairs {given.pairs} --block {given.block}",
        "date": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "machine": harness.facts_of_machine(),
        "rows": ROWS,
        "seq_len": balance.SEQ_LEN,
        "speed": ratio,
        "target": 0.99,
        **found,
    }
    harness.write_json(given.output, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
