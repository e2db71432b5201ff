"""What a job is made from: prepared rows to train and score on, vocabulary, labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.core import rng
from manyhands.core.errors import DataError, UsageError
from manyhands.core.events import Emit, ignore

if TYPE_CHECKING:
    from manyhands.core.types import Rows
    from manyhands.data.prepare import Prepared
    from manyhands.data.source import DataSpec
    from manyhands.train.job import Job
    from manyhands.wire.world import World

HOLD_OUT = 0x40  # stream of random numbers that picks held-out labelled rows
# of a job: what a global batch follows from
BATCH = ("seed", "order", "global_batch", "seq_len", "reproducible")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Rows and what is known of them.

    Attributes:
        train, evaluation: rows; no evaluation where nothing is held out.
        identity: changes when the rows change; held_out_identity: when data of their own to score on do.
        targets_per_row: targets of a full row.
    """

    train: Rows
    evaluation: Rows | None
    tokenizer: Path
    tokenizer_spec: str
    vocab_size: int
    labels: Sequence[str] | None
    identity: str
    held_out_identity: str | None
    default_model: str
    default_prompt: str
    targets_per_row: int
    documents: int
    tokens: int
    text_bytes: int
    skipped: int

    @property
    def n_labels(self) -> int | None:
        return len(self.labels) if self.labels is not None else None


def cache_directory(job: Job) -> Path:
    """Where prepared data lives: --cache, else $MANYHANDS_CACHE, else the user's cache directory."""
    if job.cache is not None:
        return Path(job.cache)
    if os.environ.get("MANYHANDS_CACHE"):
        return Path(os.environ["MANYHANDS_CACHE"]) / "prepared"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "manyhands" / "prepared"


def data_spec(job: Job, data: Sequence[str], tokenizer: str) -> DataSpec:
    """The data options of a job as the data floor's value."""
    from manyhands.data.source import DataSpec

    label = getattr(job.task, "label", "label") if job.needs.labelled else None
    return DataSpec(
        data=tuple(data),
        format=job.format,
        encoding=job.encoding,
        document=job.document,
        quoting=job.quoting,
        text=getattr(job.task, "text", "text"),
        label=label,
        tokenizer=tokenizer,
        on_error=job.on_error,
    )


def tokenizer_for(job: Job) -> str:
    """The tokenizer to use: as given; a pretrained model's own; else what fits the task."""
    from manyhands.models.build import split_call

    if job.tokenizer != "auto":
        return job.tokenizer
    model = split_call(job.model)[0]  # it may be changed: "directory(resid_pdrop=0.1)"
    if (Path(model) / "config.json").is_file():
        if any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return model
        raise UsageError(
            f"model {job.model!r} brings no tokenizer",
            "a pretrained model needs the tokens it was trained on",
            "give --tokenizer DIRECTORY",
        )
    return job.needs.tokenizer


def prepare_job(job: Job, *, processes: int, emit: Emit = ignore) -> tuple[Prepared, Prepared | None]:
    """Prepare the job's training and (if given) evaluation data, or find them prepared."""
    from manyhands.data.prepare import prepare

    cache = cache_directory(job)
    spec = tokenizer_for(job)
    _check_used(job)
    train = prepare(data_spec(job, job.data, spec), cache=cache, processes=processes, emit=emit)
    held_out = None
    if job.eval_data:
        held_out = prepare(
            data_spec(job, job.eval_data, str(train.tokenizer)), cache=cache, processes=processes, emit=emit
        )
    return train, held_out


def _check_used(job: Job) -> None:
    """Data options that speak of none of the data. Raises `UsageError`."""
    from manyhands.data.source import check_used

    given = {name: getattr(job, name) for name in ("format", "encoding", "document", "quoting")}
    if not job.needs.labelled:  # else text without columns is refused where it is read
        given["text"] = getattr(job.task, "text", "text")
    check_used((*job.data, *job.eval_data), given)


def gather_material(job: Job, world: World, emit: Emit, *, labels: Sequence[str] | None = None) -> Material:
    """Prepare together (every worker takes part; see `manyhands.data.prepare`) and cut rows.

    Args:
        labels: class names in order, where a model knows them already; default: those of the data.
    """
    train, held_out = prepare_job(job, processes=1, emit=emit if world.rank == 0 else ignore)
    needs = job.needs
    rows, evaluation = _rows(job, train, held_out, labels)
    if len(rows) == 0:
        raise DataError(
            f"{', '.join(job.data)} holds {train.tokens} tokens, which leaves no row to train on",
            f"a row has {job.seq_len} tokens",
            "give more text, a smaller --seq-len or a smaller --eval-fraction",
        )
    if evaluation is not None and len(evaluation) == 0:  # found out now, not when all is trained
        raise DataError(
            f"{', '.join(job.eval_data)} holds no row to score",
            "each token but the first is scored",
            "give more text, or leave out --eval-data",
        )
    return Material(
        train=rows,
        evaluation=evaluation,
        tokenizer=train.tokenizer,
        tokenizer_spec=tokenizer_for(job),
        vocab_size=train.vocab_size,
        labels=labels if labels is not None else train.labels,
        identity=_identity(train, held_out),
        held_out_identity=held_out.identity if held_out else None,
        default_model=needs.model,
        default_prompt="def " if job.data == ("stdlib",) else "\n",
        targets_per_row=1 if needs.labelled else job.seq_len,
        documents=train.documents,
        tokens=train.tokens,
        text_bytes=train.text_bytes,
        skipped=sum(train.skipped.values()),
    )


def check_alike(job: Job, material: Material, world: World) -> None:
    """All workers take their parts of the same global batches. Collective.

    Each prepares its own copy of the data, and under others' launchers reads its own options: what differs there loses and
    doubles samples without a word.

    Raises:
        DataError: one has other data. UsageError: one was given another batch.
    """
    held = world.gather(material.identity)
    for member, identity in zip(world.members, held, strict=True):
        if identity != held[0]:
            who, whose = (f"worker {m.rank} on {m.host}" for m in (member, world.members[0]))
            raise _other_data(job, who, f"{whose} has")
    check_same(world, {**{name: getattr(job, name) for name in BATCH}, "rows": len(material.train)})


def check_same(world: World, values: Mapping[str, Any]) -> None:
    """Everybody has these values. Collective. Raises `UsageError`."""
    everybody = world.gather(dict(values))
    for member, theirs in zip(world.members, everybody, strict=True):
        for name, value in theirs.items():
            if value != everybody[0][name]:
                raise UsageError(
                    f"{name} = {value!r} for worker {member.rank} on {member.host}, {everybody[0][name]!r} for worker 0",
                    "all workers take parts of the same global batches",
                    "give all of them the same options",
                )


def check_joins(job: Job, material: Material, running: str) -> None:
    """A newcomer has the data that the job trains on, of which `running` is the identity ("": unknown). Raises `DataError`."""
    if running and material.identity != running:
        raise _other_data(job, "this worker", "the job trains on")


def _other_data(job: Job, who: str, whose: str) -> DataError:
    return DataError(
        f"{', '.join((*job.data, *job.eval_data))}: {who} has other data there than {whose}",
        "all workers take rows of the same data",
        "copy them to every machine, and leave them as they are while the job runs",
    )


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rows that a saved model is scored on.

    Attributes:
        rows: None where nothing is held out.
        identity: changes when they change, as `Material.identity` or, where they are data of their own, `held_out_identity`.
        others: how many rows of the same data there are to train on; None where they are data of their own.
        skipped: broken rows of the data.
    """

    rows: Rows | None
    identity: str
    others: int | None
    skipped: int


def gather_scored(job: Job, world: World, emit: Emit, *, labels: Sequence[str] | None) -> Scored:
    """Prepare together what is scored, and no more: the job's `eval_data`, else the rows of `data` that it holds out."""
    from manyhands.data.prepare import prepare

    spec = data_spec(job, job.eval_data or job.data, tokenizer_for(job))
    found = prepare(spec, cache=cache_directory(job), processes=1, emit=emit if world.rank == 0 else ignore)
    fraction = 0.0 if job.eval_data else job.eval_fraction
    whole = replace(job, data=spec.data, eval_data=(), eval_fraction=fraction, eval_every=None)
    rows, held_out = _rows(whole, found, None, labels)
    if len(rows) == 0:
        raise DataError(
            f"{', '.join(spec.data)} holds {found.tokens} tokens, which is no row to score",
            "each token but the first is scored",
            "give more text",
        )
    skipped = sum(found.skipped.values())
    if job.eval_data:
        return Scored(rows=rows, identity=found.identity, others=None, skipped=skipped)
    return Scored(rows=held_out, identity=_identity(found, None), others=len(rows), skipped=skipped)


def _identity(train: Prepared, held_out: Prepared | None) -> str:
    return hashlib.sha256(f"{train.identity}/{held_out.identity if held_out else ''}".encode()).hexdigest()


def _rows(
    job: Job, train: Prepared, held_out: Prepared | None, labels: Sequence[str] | None
) -> tuple[Rows, Rows | None]:
    """What is trained (or scored) on, and what is held out, of the kind that the task needs."""
    if job.needs.labelled:
        return _labelled_rows(job, train, held_out, labels)
    return _text_rows(job, train, held_out)


def _text_rows(job: Job, train: Prepared, held_out: Prepared | None) -> tuple[Rows, Rows | None]:
    from manyhands.data.rows import TokenRows

    whole = TokenRows(train, job.seq_len)
    if held_out is not None:
        return whole, TokenRows(held_out, job.seq_len)
    held = round(len(whole) * job.eval_fraction)
    if job.eval_fraction > 0 and len(whole) > 1:
        held = max(1, held)
    if held == 0:
        return whole, None
    cut = len(whole) - held
    return TokenRows(train, job.seq_len, range(cut)), TokenRows(train, job.seq_len, range(cut, len(whole)))


def _labelled_rows(
    job: Job, train: Prepared, held_out: Prepared | None, labels: Sequence[str] | None
) -> tuple[Rows, Rows | None]:
    from manyhands.data.permute import Permutation
    from manyhands.data.rows import LabelledRows

    names = labels if labels is not None else train.labels
    every = np.arange(train.rows, dtype=np.int64)
    if held_out is not None:
        theirs = np.arange(held_out.rows, dtype=np.int64)
        return (
            LabelledRows(train, job.seq_len, every, labels=names, named=", ".join(job.data)),
            LabelledRows(held_out, job.seq_len, theirs, labels=names, named=", ".join(job.eval_data)),
        )
    held = round(len(every) * job.eval_fraction)
    if job.eval_fraction > 0 and len(every) > 1:
        held = max(1, held)
    shuffled = Permutation(len(every), rng.key(job.seed, HOLD_OUT), 0).take(every)
    first, rest = np.sort(shuffled[:held]), np.sort(shuffled[held:])
    return (
        LabelledRows(train, job.seq_len, rest, labels=names, named=(named := ", ".join(job.data))),
        LabelledRows(train, job.seq_len, first, labels=names, named=named) if held else None,
    )


def as_data(material: Material) -> dict[str, Any]:
    """Figures of the data for the summary."""
    return {
        "documents": material.documents,
        "tokens": material.tokens,
        "text_bytes": material.text_bytes,
        "skipped": material.skipped,
        "rows": len(material.train),
        "eval_rows": len(material.evaluation) if material.evaluation is not None else 0,
        "identity": material.identity,
    }
