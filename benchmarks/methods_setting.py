"""What the comparison of methods trains: wikitext2 as token rows, and initial weights, made once for everybody.

A setting is a directory:

* ``init-S/``: a GPT-2 of Transformers with fresh weights of seed S, for `from_pretrained`;
* ``rows-S.npy``: [steps·batch, seq_len+1] int32, the rows in the order in which a `manyhands train` of seed S meets them: step t of
  a global batch B is rows [B·t, B·t + B). Targets of padding are −100;
* ``valid.txt``: the first 300 KB of wikitext2's validation text; ``eval.npy``: its rows, in order;
* ``prepared/``: the cache from which manyhands itself reads.

Two sizes. *large* (30M parameters) is what the rates are measured with. *small* (0.7M) is what losses are compared with over
many methods and seeds: a loss does not depend on the link, and 30M parameters times all methods times three seeds do not fit
into an hour of two cores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2"
FORMAT = 5
HELD_OUT_BYTES = 120_000  # evaluated eight times in a run; all methods are held against the same rows


@dataclass(frozen=True)
class Size:
    """A model and how it is trained.

    Attributes:
        lr: AdamW's, the same for every method; cosine to a tenth after `warmup` steps.
        steps: of a run for its loss.
    """

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    seq_len: int
    global_batch: int
    lr: float
    warmup: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def schedule(self) -> str:
        return f"cosine(warmup={self.warmup})"


SIZES = {
    "large": Size("large", 7, 512, 8, 16384, 256, 8, 1e-3, 40, 400),
    "small": Size("small", 2, 128, 4, 2048, 128, 8, 3e-3, 64, 1024),
    # to try the programs out
    "tiny": Size("tiny", 2, 64, 2, 512, 32, 8, 3e-3, 5, 40),
}


def missing() -> str | None:
    """Why the data are not there; None where they are."""
    return None if (DATA / "train.txt").is_file() else f"wikitext2 is not at {DATA}"


def options(size: Size, place: Path, seed: int, device: str = "cpu") -> list[str]:
    """`manyhands train`'s options for this work, without strategy, length and output."""
    return [
        *("--data", str(DATA / "train.txt"), "--eval-data", str(place / "valid.txt")),
        *("--tokenizer", f"bpe:{size.vocabulary}", "--cache", str(place / "prepared")),
        *("--model", str(place / f"init-{seed}"), "--seq-len", str(size.seq_len)),
        *("--global-batch", str(size.global_batch), "--seed", str(seed), "--prompt", ""),
        *("--max-grad-norm", "1.0", "--threads", "1", "--device", device),
    ]


def make(directory: Path, size: Size, seed: int) -> dict[str, Any]:
    """The setting of a size and seed in `directory`, made if it is not there; its figures."""
    path = directory / f"setting-{seed}.json"
    expected = {"format": FORMAT, **asdict(size)}
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        if expected.items() <= known.items():
            return known
    directory.mkdir(parents=True, exist_ok=True)
    text = (DATA / "valid.txt").read_bytes()[:HELD_OUT_BYTES]
    (directory / "valid.txt").write_bytes(text[: text.rfind(b"\n") + 1])
    data = _write_rows(directory, size, seed)
    model = _write_model(directory / f"init-{seed}", size, seed)
    facts = {**expected, **data, **model}
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _write_rows(directory: Path, size: Size, seed: int) -> dict[str, Any]:
    import numpy as np

    from manyhands.core.events import ignore
    from manyhands.data.rows import TokenRows
    from manyhands.data.sample import Order
    from manyhands.train.job import Job
    from manyhands.train.material import gather_material
    from manyhands.wire.solo import Solo
    from manyhands.wire.world import Member, World

    job = Job(
        data=(str(DATA / "train.txt"),),
        eval_data=(str(directory / "valid.txt"),),
        tokenizer=f"bpe:{size.vocabulary}",
        cache=str(directory / "prepared"),
        seq_len=size.seq_len,
        seed=seed,
    )
    material = gather_material(job, World(Solo("cpu"), (Member(0, "here", "cpu"),), "solo"), ignore)
    if material.vocab_size != size.vocabulary:
        raise SystemExit(f"the tokenizer has {material.vocab_size} tokens, not {size.vocabulary}")

    def block(rows: Any, ids: Any) -> Any:
        batch = rows.take(ids)
        inputs, targets = batch["input_ids"].numpy(), batch["targets"].numpy()
        return np.concatenate([inputs[:, :1], targets], axis=1).astype(np.int32)  # [rows, seq_len + 1]

    train = material.train
    assert isinstance(train, TokenRows)
    order = Order(len(train), size.global_batch, seed)
    ids = np.concatenate([order.ids(step) for step in range(size.steps)])
    np.save(directory / f"rows-{seed}.npy", block(train, ids))
    held = material.evaluation
    assert held is not None
    np.save(directory / "eval.npy", block(held, np.arange(len(held))))
    return {"data_rows": len(train), "data_tokens": material.tokens, "eval_rows": len(held)}


def _write_model(directory: Path, size: Size, seed: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=size.seq_len,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return {"parameters": sum(p.numel() for p in model.parameters())}
