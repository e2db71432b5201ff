"""What a launcher hands to each worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from manyhands.core import config
from manyhands.train.job import Job

BY_DEVICE = ("device_batch", "compile", "precision")  # of a job: what is derived for one kind of device


@dataclasses.dataclass(frozen=True)
class Order:
    """The job, where its values came from, how it was started.

    Attributes:
        job: with derived values in place of its "auto", once it runs.
        chosen: of a running job: the kind of device for which some values were derived, and what had been given.
        data: of a running job: the identity of its rows (`Material.identity`).
    """

    job: Job
    origins: Mapping[str, str]
    started: float = 0.0
    chosen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: str = ""

    @staticmethod
    def running(
        effective: Job, given: Job, kind: str, origins: Mapping[str, str], started: float, data: str = ""
    ) -> Order:
        """Of a job as a worker on that kind of device runs it."""
        chosen = {"kind": kind, **{name: getattr(given, name) for name in BY_DEVICE}}
        return Order(effective, dict(origins), started, chosen, data)

    def to_json(self) -> str:
        said = {"origins": dict(self.origins), "started": self.started, "chosen": dict(self.chosen)}
        return json.dumps({"job": config.to_data(self.job), **said, "data": self.data})

    def job_on(self, kind: str) -> Job:
        """The job for a worker on that kind of device ("cpu", "cuda"), which derives for itself what others derived for theirs."""
        if self.chosen.get("kind", kind) == kind:
            return self.job
        return dataclasses.replace(self.job, **{name: self.chosen[name] for name in BY_DEVICE})

    @staticmethod
    def from_json(text: str) -> Order:
        data = json.loads(text)
        job = config.from_data(Job, data["job"])
        return Order(
            job, data["origins"], data["started"], data["chosen"], data.get("data", "")
        )  # "": an early release's
