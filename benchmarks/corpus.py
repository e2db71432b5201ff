"""Text of any size to prepare: the standard library's sources over and over, varied, in files of about 256 KiB."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

FILE_BYTES = 1 << 18
SEED = 0


def make(directory: Path, size_bytes: int) -> Path:
    """Write about `size_bytes` into `directory`, unless it is there; the same bytes every time, never all in memory.

    In each copy after the first a tenth of the longer words gets the copy's number, so that no copy is the last one's.
    """
    if (directory / ".whole").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    sources = sorted(f for f in root.rglob("*.py") if not skipped & set(f.relative_to(root).parts))
    draw = random.Random(SEED)
    written = copy = number = 0
    while written < size_bytes:
        draw.shuffle(sources)
        pieces: list[str] = []
        for source in sources:
            pieces.append(_vary(source.read_text(encoding="utf-8", errors="replace"), copy, draw))
            if sum(map(len, pieces)) < FILE_BYTES:
                continue
            written += (directory / f"{number:05d}.txt").write_bytes("\n".join(pieces).encode())
            number, pieces = number + 1, []
            if written >= size_bytes:
                break
        copy += 1
    (directory / ".whole").touch()
    return directory


def _vary(text: str, copy: int, draw: random.Random) -> str:
    if not copy:
        return text
    return re.sub(r"[a-z]{6,}", lambda word: word[0] + str(copy) if draw.random() < 0.1 else word[0], text)
