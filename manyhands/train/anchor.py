"""A job whose local paths hold from any directory, for ``OUTPUT/config.toml``: it is read again from wherever its reader is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from manyhands.core import registry
from manyhands.train.job import Job
from manyhands.train.job_names import is_text


def anchored(job: Job) -> Job:
    """`job` with absolute paths of what it reads, and of its cache. The output is where the configuration is read from."""
    return dataclasses.replace(
        job,
        data=tuple(map(_data, job.data)),
        eval_data=tuple(map(_data, job.eval_data)),
        model=_model(job.model),
        tokenizer=_tokenizer(job.tokenizer),
        cache=_absolute(job.cache) if job.cache is not None else None,
    )


def _absolute(path: str) -> str:
    """As it is spelled, but from the root: links and patterns keep their meaning."""
    whole = str(Path(path).absolute())
    return whole if is_text(whole) else path  # TOML cannot say every name of a directory


def _data(name: str) -> str:
    """A path or a pattern; addresses, Hugging Face's own data sets and the standard library are no place of this machine's."""
    kind, colon, rest = name.partition(":")
    if kind == "hf" and colon:
        for path, split in ((rest, ""), (rest.rpartition(":")[0], rest[rest.rfind(":") :])):
            if path and os.path.exists(path):  # one that was saved here
                return f"hf:{_absolute(path)}{split}"
        return name
    first, chained, last = name.rpartition("::")  # fsspec's: the last link is where the bytes are
    if name == "stdlib" or "://" in last:
        return name
    return f"{first}{chained}{_absolute(os.path.expanduser(last))}"


def _model(name: str) -> str:
    from manyhands.models.build import split_call

    head = split_call(name)[0]
    changes = name[len(head) :]
    if head.startswith("config:"):
        return f"config:{_absolute(head.removeprefix('config:'))}{changes}"
    known = head in registry.entries("models")
    return _absolute(head) + changes if not known and Path(head).is_dir() else name


def _tokenizer(name: str) -> str:
    from manyhands.data.tokenize import parse

    return _absolute(name) if name != "auto" and parse(name)[0] == "directory" else name
