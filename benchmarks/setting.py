"""What every contender of the speed comparison trains: one model, one list of rows, one order. Made once, then reused.

A setting is a directory:

* ``init/``: a GPT-2 of Transformers (6 layers × 384, 6 heads, vocabulary 8,192, 256 positions, dropout 0), saved with
  `save_pretrained` from a seed: everybody starts with the same bits;
* ``rows.npy``: [rows, 257] uint16, packed tokens of the Python standard library's sources (byte-pair encoding of 8,192,
  trained by the `tokenizers` library). Step t of a global batch of B reads rows [B·t, B·t + B); inputs are the
  first 256 tokens of a row, targets the last 256;
* ``ids.npy``: which row of the prepared data each of them is (only `manyhands_loop.py` needs it);
* ``bench.toml``: the same job for `manyhands train`, which reads the same prepared data in the same order;
* ``setting.json``: sizes, seed, hashes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

SEQ_LEN = 256
GLOBAL_BATCH = 16
MAX_STEPS = 256
VOCABULARY = 8192
FORMAT = 2  # of the directory, and of the data floor that made its rows

JOB = """\
# The job of the speed comparison, as `manyhands train` reads it.
data = ["stdlib"]
tokenizer = "bpe:{vocabulary}"
cache = "{cache}"
model = "{model}"
seq_len = {seq_len}
seed = {seed}
eval_fraction = 0.0
max_grad_norm = 1.0
log_every = 1
prompt = ""
strategy = "ddp(lr=3e-4, weight_decay=0.1, schedule='constant')"
"""


@dataclass(frozen=True)
class Setting:
    """Figures of a setting.

    Attributes:
        seed: of the initial weights and of the order.
        flops_per_token: 6·N + 12·L·d·s, N the parameters that are multiplied with (without the position table; the
            token table counts once, as the head).
    """

    seed: int
    parameters: int
    flops_per_token: float
    rows: int
    data_rows: int
    rows_sha256: str
    weights_sha256: str
    format: int = FORMAT


def make(directory: Path) -> Setting:
    """The setting in `directory`, made if it is not there."""
    path = directory / "setting.json"
    if path.exists():
        known = json.loads(path.read_text())
        if known.get("format") == FORMAT:
            return Setting(**known)
    directory.mkdir(parents=True, exist_ok=True)
    seed, data_rows, end_id = _write_rows(directory)
    parameters, flops = _write_model(directory / "init", seed, end_id)
    (directory / "bench.toml").write_text(
        JOB.format(
            vocabulary=VOCABULARY,
            cache=directory / "prepared",
            model=directory / "init",
            seq_len=SEQ_LEN,
            seed=seed,
        )
    )
    setting = Setting(
        seed=seed,
        parameters=parameters,
        flops_per_token=flops,
        rows=GLOBAL_BATCH * MAX_STEPS,
        data_rows=data_rows,
        rows_sha256=_sha256(directory / "rows.npy"),
        weights_sha256=_sha256(directory / "init" / "model.safetensors"),
    )
    path.write_text(json.dumps(asdict(setting), indent=1) + "\n")
    return setting


def _write_rows(directory: Path) -> tuple[int, int, int]:
    """Write rows.npy and ids.npy; returns (seed, rows in the data, id of the end token)."""
    import numpy as np

    from manyhands.data.rows import TokenRows
    from manyhands.data.sample import Order
    from manyhands.train.job import Job
    from manyhands.train.material import prepare_job

    job = Job(tokenizer=f"bpe:{VOCABULARY}", cache=str(directory / "prepared"), seq_len=SEQ_LEN)
    prepared, _ = prepare_job(job, processes=1)
    if prepared.vocab_size != VOCABULARY:
        raise SystemExit(f"the tokenizer has {prepared.vocab_size} tokens, not {VOCABULARY}")
    rows = TokenRows(prepared, SEQ_LEN)
    wanted = GLOBAL_BATCH * MAX_STEPS
    if len(rows) <= wanted:
        raise SystemExit(f"the standard library gives {len(rows)} rows; more than {wanted} are needed")
    for seed in (
        count()
    ):  # the data's last row is padded; a seed whose first steps do without it keeps the peers simple
        order = Order(len(rows), GLOBAL_BATCH, seed)
        ids = np.concatenate([order.ids(step) for step in range(MAX_STEPS)])
        if len(rows) - 1 not in ids:
            break
    batch = rows.take(ids)
    block = np.concatenate([batch["input_ids"].numpy(), batch["targets"].numpy()[:, -1:]], axis=1)
    assert (block[:, 1:] == batch["targets"].numpy()).all()
    np.save(directory / "rows.npy", block.astype(np.uint16))  # [rows, 257]
    np.save(directory / "ids.npy", ids)
    return seed, len(rows), prepared.end_id


def _write_model(directory: Path, seed: int, end_id: int) -> tuple[int, float]:
    """Write the initial model; returns (parameters, FLOPs per token)."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    from manyhands.models.describe import describe

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=SEQ_LEN,
        n_embd=384,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    about = describe(model, seq_len=SEQ_LEN)
    return about.parameters, about.flops_per_token


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
