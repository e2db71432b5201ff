"""Rules of a job's options for names and for what is read from them. Those of how it is trained are in `manyhands.train.job`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manyhands.core.errors import UsageError

if TYPE_CHECKING:
    from manyhands.train.job import Job


def check_names(job: Job) -> None:
    """Of files and directories: they are not empty (a shell's unset variable), and can be written into config.toml."""
    for name in ("data", "eval_data", "model", "tokenizer", "output", "cache", "resume"):
        value = getattr(job, name)
        for word in value if isinstance(value, tuple) else (value,):
            if word == "":
                raise UsageError(
                    f"{name} holds an empty name",
                    "it would mean the directory one is in",
                    "check the command",
                )
            if word is not None and not is_text(word):
                raise UsageError(
                    f"{name} = {word!r}",
                    "names are kept in config.toml, which is UTF-8",
                    "rename it, or go there through a link",
                )


def check_ignored(job: Job) -> None:
    """Options that would be read and do nothing."""
    for word in (*job.data, *job.eval_data):
        if word.lower().endswith(".toml") and job.format == "auto" and not any(c in word for c in "*?["):
            raise UsageError(
                f"data names {word}",
                "a job's file is no text to train on",
                f"put it first (manyhands train {word} --data …), or say --format text",
            )
    if job.eval_every is not None and not job.eval_data and not job.eval_fraction:
        raise UsageError(
            f"eval_every = {job.eval_every} with eval_fraction = 0",
            "nothing is held out to evaluate on",
            "leave out --eval-every, or give --eval-data or a larger --eval-fraction",
        )
    if job.prompt and not job.needs.continues:
        raise UsageError(
            f"prompt = {job.prompt!r} with task = {job.task_name!r}",
            "this task's model continues no text",
            "leave out --prompt",
        )
    if job.document == "line" and job.format not in ("auto", "text"):
        raise UsageError(
            f"document = 'line' with format = {job.format!r}",
            "only of plain text it is a question what a document is",
            "leave out --document",
        )


def is_text(word: str) -> bool:
    """Whether it is Unicode: bytes of a name that are not UTF-8 become lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in word)
