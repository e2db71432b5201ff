"""What others read, frozen: the keys and the types of ``summary.json`` and of the lines of ``metrics.jsonl``.

Adding a key is a change of contract, too: it is written here. Where a
figure is no number (NaN), or unknown (`mfu` without a peak), it is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SUMMARY: dict[str, Any] = {
    "format": "int",
    "reason": "str",
    "resumed_from": "int",
    "steps": "int",
    "samples": "int",
    "target_tokens": "int",
    "skipped_steps": "int",
    "wall_s": "float",
    "train_s": "float",
    "tokens_per_s": "float",
    "mfu": "float",
    "flops_per_token": "float",
    "peak_flops": "float",
    "train_loss": "float",
    "eval": {"loss": "float", "perplexity": "float", "bits_per_byte": "float", "accuracy": "float"},
    "strategy": "dict",  # as in config.toml
    "world_sizes": ["int"],
    "model": {"name": "str", "parameters": "int"},
    "data": {
        "documents": "int",
        "tokens": "int",
        "text_bytes": "int",
        "skipped": "int",
        "rows": "int",
        "eval_rows": "int",
        "identity": "str",
    },
    "precision": "str",
    "compile": "bool",
    "parameters_sha256": "str",
    "machine": {
        "cpu": "str",
        "cores": "int",
        "memory_bytes": "int",
        "os": "str",
        "python": "str",
        "versions": "dict",
    },
    "workers": [
        {
            "rank": "int",
            "host": "str",
            "device": "str",
            "samples": "int",
            "tokens": "int",
            "compute_s": "float",
            "communicate_s": "float",
            "idle_s": "float",
            "sent_bytes": "int",
            "received_bytes": "int",
        }
    ],
}
CLASSIFIER = {"loss": "float", "accuracy": "float", "macro_f1": "float"}  # `eval` of classify
SERVED = {  # `served`, where there are parameter servers
    "consistency": "str",
    "updates": "int",
    "staleness": "dict",
    "discarded": "int",
    "parameter_bytes": ["int"],
}
EVENTS = {  # what a value is in JSON; a number that is not finite is a string
    "planned": "rows:list",
    "preparing": "done_bytes:int total_bytes:int|None tokens:int phase:str",
    "prepareddata": "directory:str documents:int tokens:int text_bytes:int skipped:int reused:bool wall_s:float",
    "warned": "message:str where:str",
    "stepped": "step:int total_steps:int epoch:float loss:float lr:float grad_norm:float samples:int target_tokens:int "
    "tokens_per_s:float mfu:float communicate_share:float memory_bytes:int eta_s:float",
    "redivided": "step:int shares:list rows_per_s:list",
    "evaluating": "done:int total:int",
    "evaluated": "step:int metrics:dict wall_s:float",
    "saved": "step:int path:str size_bytes:int wall_s:float blocked_s:float",
    "resumed": "step:int path:str from_workers:int workers:int",
    "sampled": "step:int prompt:str text:str",
    "served": "consistency:str updates:int discarded:int staleness:dict",
    "lost": "seat:str rank:int host:str how:str detail:str phase:str step:int stack:str silent_s:float then:str",
    "left": "seat:str rank:int host:str step:int detail:str",
    "joined": "seat:str rank:int host:str step:int size_bytes:int wall_s:float",
    "reformed": "epoch:int workers:int step:int wall_s:float kept_places:int redone_places:int by:str rebuilt:str redone_steps:int",
    "aligned": "step:int ranks:list drift:float size_bytes:int wall_s:float",
    "mended": "seat:str rank:int host:str step:int what:str source:str size_bytes:int wall_s:float",
    "balance": "step:int wall_s:float workers:list slowest:str reason:str",
    "finished": "step:int reason:str wall_s:float summary:str load:str",
}
LOAD = "seat:str rank:int host:str rows:int compute_s:float data_s:float wait_s:float network_s:float"


def check(value: Any, kind: Any, where: str = "summary") -> None:
    """`value` has exactly the keys of `kind`, with values of those types."""
    if isinstance(kind, dict):
        assert list(value) == list(kind), where
        for key, each in kind.items():
            check(value[key], each, f"{where}.{key}")
    elif isinstance(kind, list):
        assert isinstance(value, list), where
        for each in value:
            check(each, kind[0], f"{where}[]")
    else:
        assert type(value).__name__ == kind, f"{where} = {value!r} is no {kind}"


def check_lines(metrics: Path) -> None:
    """Each line of a ``metrics.jsonl`` has exactly the keys of its event, with values of those types."""
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        name, _ = record.pop("event"), record.pop("time_s")
        kinds = dict(word.split(":") for word in EVENTS[name].split())
        assert set(record) == set(kinds), name
        for key, kind in kinds.items():
            found = type(record[key]).__name__
            allowed = {*kind.split("|"), *(("str", "int") if kind == "float" else ())}
            assert found.replace("NoneType", "None") in allowed, (
                f"{name}.{key} = {record[key]!r} is no {kind}"
            )
