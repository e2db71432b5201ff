"""What a launcher hands to each worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from manyhands.core import config
from manyhands.train.job import Job


@dataclasses.dataclass(frozen=True)
class Order:
    """The job, where its values came from, how it was started."""

    job: Job
    origins: Mapping[str, str]
    started: float = 0.0

    def to_json(self) -> str:
        return json.dumps(
            {"job": config.to_data(self.job), "origins": dict(self.origins), "started": self.started}
        )

    @staticmethod
    def from_json(text: str) -> Order:
        data = json.loads(text)
        return Order(config.from_data(Job, data["job"]), data["origins"], data["started"])
