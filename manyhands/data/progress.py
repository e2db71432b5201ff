"""How far a preparation is, as its directory tells: several processes work on it, this one may be idle."""

from __future__ import annotations

import json
import time
from pathlib import Path

from manyhands.core.events import Emit, Preparing
from manyhands.data.source import SourceFile


class Progress:
    """Emits how much is done, from the pieces' files; at most four times a second."""

    def __init__(self, directory: Path, files: list[SourceFile], emit: Emit) -> None:
        self._directory, self._emit = directory, emit
        self._total = sum(f.size_bytes for f in files)
        self._packed = any(f.compression or f.format not in ("text", "jsonl") for f in files)
        self._known: dict[str, tuple[int, int]] = {}
        self._shown = 0.0

    def show(self) -> None:
        if time.monotonic() - self._shown < 0.25:
            return
        self._shown = time.monotonic()
        for path in self._directory.glob("piece-*.json"):
            if path.name not in self._known:
                facts = json.loads(path.read_text())
                self._known[path.name] = (facts["text_bytes"], facts["tokens"])
        done = sum(b for b, _ in self._known.values())
        tokens = sum(t for _, t in self._known.values())
        self._emit(
            Preparing(done_bytes=done, total_bytes=None if self._packed else self._total, tokens=tokens)
        )
