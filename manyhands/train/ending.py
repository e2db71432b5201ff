"""What a run says at its end: a sampled continuation, its summary, and how to load what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyhands.core import rng
from manyhands.core.errors import PeerLost, Stopped
from manyhands.core.events import Finished, Sampled, Served, Warned

if TYPE_CHECKING:
    from manyhands.core.events import Emit
    from manyhands.core.signals import Interrupts
    from manyhands.train.job import Job
    from manyhands.train.loop import Loop
    from manyhands.train.material import Material

DRAWN = 0x5A  # stream of random numbers for the sampled continuation


def sample(loop: Loop, job: Job, material: Material, interrupts: Interrupts, emit: Emit) -> None:
    """A continuation, drawn by rank 0; why there is none is a warning, for the training is done. Collective."""
    from manyhands.train.generate import continuation

    model = loop.replica.model
    if not job.needs.continues or job.prompt == "":
        return
    why = ""
    if getattr(loop.replica.method, "share", None) is not None:
        why = "several workers compute one forward pass; manyhands generate continues a prompt"
    elif not getattr(model, "can_generate", lambda: False)():  # Transformers' own, not any `generate`
        why = f"a {type(model).__name__} does not generate as Transformers' models do"
    if why:
        if job.prompt is not None and loop.world.rank == 0:  # somebody has asked for one
            emit(Warned(message=f"no sample: {why}", where="generate"))
        return
    prompt = job.prompt if job.prompt is not None else material.default_prompt
    with loop.replica.agreed():
        if loop.world.rank != 0:
            return
        try:
            with interrupts.phase("generate", interruptible=True), loop.autocast():
                rng.seed_torch(job.seed, DRAWN)
                text = continuation(model, material.tokenizer, prompt, new_tokens=96)
        except (Stopped, PeerLost):
            raise
        except Exception as error:
            emit(Warned(message=f"no sample: {type(error).__name__}: {error}", where="generate"))
            return
        emit(Sampled(step=loop.replica.steps, prompt=prompt, text=text))


def tell(loop: Loop, summary: dict[str, Any], output: Path, emit: Emit) -> dict[str, Any]:
    """Write ``summary.json`` and say that the run has ended; the summary, which may be an earlier one of the same end."""
    from manyhands.models.store import loading_line
    from manyhands.train import checkpoint
    from manyhands.train.durable import write_json
    from manyhands.train.summary import kept

    path = output / "summary.json"
    if not loop.tally.began:  # there was nothing left to do: what the run did is told already
        summary = kept(path, summary)
    write_json(path, summary)
    if "served" in summary:
        names = ("consistency", "updates", "discarded", "staleness")
        emit(Served(**{name: summary["served"][name] for name in names}))
    newest = checkpoint.latest(output)
    emit(
        Finished(
            step=loop.replica.steps,
            reason=summary["reason"],
            wall_s=summary["wall_s"],
            summary=str(path),
            load=loading_line(newest) if newest is not None else "",
        )
    )
    return summary
