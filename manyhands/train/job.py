"""A training job as one value: what TOML files, the command line, Python and checkpoints say.

Every field is an option of `manyhands train` (``--global-batch 64``), a key of the TOML file and an attribute here.
`check` refuses options that would be ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from manyhands.cadence.every import EveryStep
from manyhands.core.config import choice, option
from manyhands.core.errors import UsageError
from manyhands.core.needs import Needs, needs_of
from manyhands.core.types import Task
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.ordered import Ordered
from manyhands.strategy.base import Strategy
from manyhands.train.job_names import check_ignored, check_names


@dataclass(frozen=True, kw_only=True)
class Job:
    """See each field's help; `None` means: derived, and shown with its reason before the start."""

    # what is learnt, from what
    task: Task = choice("tasks", "pretrain", help="pretrain, or classify(text=COLUMN, label=COLUMN)")
    data: tuple[str, ...] = option(
        ("stdlib",),
        help="files, globs, directories, fsspec URLs, hf:PATH; 'stdlib' is the Python library's sources; repeatable",
        aliases=("train_file", "dataset_name"),
    )
    eval_data: tuple[str, ...] = option(
        (),
        help="held-out data in the same forms; none: --eval-fraction of --data",
        aliases=("validation_file",),
    )
    eval_fraction: float = option(
        0.05, help="share of the rows held out where --eval-data is not given; 0: no evaluation"
    )
    format: str = option("auto", help="text, jsonl, json, csv, tsv, parquet or arrow; auto: by the file name")
    encoding: str = option("utf-8", help="character encoding of text files")
    document: Literal["file", "line"] = option("file", help="what one document of a plain text file is")
    quoting: Literal["auto", "csv", "none"] = option(
        "auto",
        help="whether quotes in CSV and TSV hold line ends and delimiters (csv), or are letters (none); auto: csv for CSV",
    )
    on_error: Literal["skip", "fail"] = option(
        "skip", help="broken rows and files are skipped and counted, or fatal"
    )
    # model
    model: str = option(
        "auto",
        help="a preset (manyhands list models), with changes as in gpt2-nano(n_layer=4); a from_pretrained directory; "
        "config:FILE.json; module:function",
        aliases=("model_name_or_path",),
    )
    tokenizer: str = option(
        "auto", help="byte, char, word:N, bpe:N, or a tokenizer directory", aliases=("tokenizer_name",)
    )
    seq_len: int = option(
        256,
        help="tokens in a row; texts are cut there",
        aliases=("block_size", "max_seq_length", "max_length"),
    )
    # how the workers agree, and on how much
    strategy: Strategy = choice(
        "strategies", "ddp", help="a preset with parameters, as in ddp(lr=3e-4, bucket_mb=8)"
    )
    inner_steps: Literal["by-speed", "fixed"] = option(
        "by-speed",
        help="local steps of a round, where shares differ: fewer, of one size, for the slower; or as many, of less rows",
    )
    reproducible: bool = option(
        False, help="the same bits for any number of workers (slower: see benchmarks/README.md)"
    )
    order: Literal["shuffled", "by-length", "stratified"] = option(
        "shuffled",
        help="of labelled rows; by-length: neighbours in a global batch are alike, less padding; stratified: so, and "
        "each global batch has every class in proportion",
    )
    global_batch: int = option(
        16, help="rows in one optimizer step, over all workers", aliases=("total_batch_size",)
    )
    micro_batch: int | None = option(
        None, help="rows in the unit of ownership, of randomness and of the fixed order"
    )
    device_batch: int | None = option(
        None, help="most rows in one forward pass", aliases=("per_device_train_batch_size",)
    )
    shares: tuple[float, ...] | None = option(
        None, help="relative share of each worker, as in 2,1, fixed; none: see --balance"
    )
    balance: Literal["auto", "off"] = option(
        "auto", help="shares of the global batch follow the workers' measured speeds; off: equal shares"
    )
    steps: int | None = option(None, help="optimizer steps; none: --epochs", aliases=("max_steps",))
    epochs: float | None = option(
        None, help="passes over the data; none: 1, or --steps", aliases=("num_train_epochs",)
    )
    max_grad_norm: float = option(1.0, help="clip the global gradient norm to this; 0: never")
    seed: int = option(0, help="of the order, the initial model and every random number")
    # on what
    launcher: str = option(
        "auto",
        help="who starts the workers (manyhands list launchers); auto: this machine, or whoever has set RANK",
    )
    workers: int | None = option(None, help="processes on this machine; none: one per core or GPU")
    device: Literal["auto", "cpu", "cuda", "mixed"] = option(
        "auto", help="where the model lives; mixed: workers take the GPUs first, further ones the CPU"
    )
    threads: int | None = option(None, help="threads of each worker; none: the cores divided among them")
    transport: Literal["auto", "shared", "group"] = option(
        "auto", help="shared memory, or a gloo/NCCL process group"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = option(
        "auto",
        help="of forward and backward (parameters stay float32); auto: bf16 where the device has units for it",
    )
    residual: Literal["fp32", "bf16"] = option(
        "fp32",
        help="of the sum over layers, where precision is bf16; bf16: less exact, a twentieth faster on a GPU",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto", help="torch.compile the model", aliases=("torch_compile",)
    )
    gradient_checkpointing: bool = option(
        False, help="recompute activations in backward: less memory, a third slower"
    )
    # who is lost, who comes
    elastic: Literal["auto", "off"] = option(
        "auto",
        help="auto: the others go on when a worker is lost, and workers may join; off: it ends the job",
    )
    restarts: int = option(
        3,
        help="replacements for each lost worker, counted anew after ten minutes of health",
        aliases=("max_restarts",),
    )
    min_workers: int = option(1, help="fewer cannot go on: the job waits for a replacement, or ends")
    hang_s: float = option(10.0, help="seconds without a sign of life after which a worker is given up")
    stuck_s: float = option(
        300.0,
        help="seconds (at least five times the longest step) after which a worker is given up whose main thread stands still; "
        "six times that in phases that may take long",
    )
    lost_round: Literal["auto", "redo", "drop"] = option(
        "auto",
        help="local steps that a lost worker has made since the last agreement: made again by the others, or left out (the "
        "ledger says so); auto: redo where all agree at once (not in fragments or pairs)",
    )
    # when
    log_every: int | None = option(
        None, help="steps between log lines; none: about every two seconds", aliases=("logging_steps",)
    )
    eval_every: int | None = option(
        None, help="steps between evaluations; none: at the end", aliases=("eval_steps",)
    )
    save_every: int | None = option(
        None,
        help="steps between checkpoints; none: every ten minutes and at the end",
        aliases=("save_steps",),
    )
    check_every: int = option(
        100, help="steps between comparisons of all replicas' fingerprints; 0: only at checkpoints"
    )
    on_divergence: Literal["stop", "mend"] = option(
        "stop",
        help="a replica whose fingerprint differs from the majority's: stop and say which, or give it theirs",
    )
    keep: int = option(3, help="checkpoints to keep", aliases=("save_total_limit",))
    # where
    output: str = option(
        "output", help="directory of checkpoints, metrics, logs and summary", aliases=("output_dir",)
    )
    cache: str | None = option(None, help="directory of prepared data; none: the user's cache directory")
    resume: str | None = option(
        None,
        help="continue from this checkpoint or output directory; auto: from --output, where it holds a checkpoint",
        aliases=("resume_from_checkpoint",),
    )
    report_to: tuple[str, ...] = option((), help="further sinks: tensorboard")
    prompt: str | None = option(
        None, help="what the sampled continuation at the end starts with; '' samples none"
    )

    def __post_init__(self) -> None:
        check_names(self)
        for name in ("global_batch", "seq_len", "keep"):
            _at_least(name, getattr(self, name), 1)
        for name in (
            "micro_batch",
            "device_batch",
            "steps",
            "workers",
            "threads",
            "log_every",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("check_every", self.check_every, 0)
        _at_least("restarts", self.restarts, 0)
        _at_least("min_workers", self.min_workers, 1)
        if not 1 <= self.hang_s < 1e6:
            raise UsageError(
                f"hang_s = {self.hang_s}", "a busy worker may be silent for a moment", "give hang_s >= 1"
            )
        if not 1 <= self.stuck_s < 1e6:
            raise UsageError(f"stuck_s = {self.stuck_s}", "a step takes its time", "give stuck_s >= 1")
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(
                f"eval_fraction = {self.eval_fraction}", "it is a share of the rows", "give 0 <= x < 1"
            )
        if not 0 <= self.max_grad_norm < math.inf:
            raise UsageError(
                f"max_grad_norm = {self.max_grad_norm}",
                "a norm is finite and not negative",
                "0 switches clipping off",
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UsageError(
                f"epochs = {self.epochs}",
                "training passes over some of the data, and ends",
                "give a positive number",
            )
        if self.steps is not None and self.epochs is not None:
            raise UsageError("steps and epochs are both given", "the length is said once", "leave one out")
        if not self.data:
            raise UsageError(
                "data is empty",
                "training needs text",
                "give --data, or leave it out for the stdlib's sources",
            )
        self._check_pairs()
        check_ignored(self)

    def _check_pairs(self) -> None:
        placement = self.strategy.placement
        if self.device == "mixed" and any(
            getattr(placement, f"needs_{what}", False) for what in ("group", "shared_memory")
        ):
            raise UsageError(
                f"device = 'mixed' with placement = {placement!r}",
                "a divided or shared model lives on one kind of device",
                "use a strategy with whole replicas (ddp, diloco), or --device cuda",
            )
        if self.device == "mixed" and not self.check_every:
            raise UsageError(
                "device = 'mixed' with check_every = 0",
                "replicas on unlike devices drift apart by rounding until they are compared",
                "leave out --check-every",
            )
        if self.reproducible and self.device in ("cuda", "mixed"):
            raise UsageError(
                f"reproducible = true with device = {self.device!r}",
                "the bitwise promise is made for CPU kernels, whose order of additions is fixed",
                "use --device cpu, or leave out --reproducible",
            )
        if self.reproducible and not self._adds_raw_gradients():
            raise UsageError(
                f"reproducible = true with strategy = {self.strategy!r}",
                "the fixed order adds the raw gradients of each step, and takes the exchange's place",
                "use --strategy ddp, or leave out --reproducible",
            )
        if self.reproducible and self.compile == "on":
            raise UsageError(
                "reproducible = true with compile = 'on'",
                "compiled kernels are chosen per shape and machine",
                "leave out --compile on",
            )
        if self.reproducible and self.threads not in (None, 1):
            raise UsageError(
                f"reproducible = true with threads = {self.threads}",
                "the order of additions inside a kernel depends on how many threads there are: each worker has one",
                "leave out --threads",
            )
        if self.reproducible and self.device_batch is not None:
            raise UsageError(
                "reproducible = true with device_batch",
                "each forward pass holds exactly one micro-batch then",
                "use --micro-batch",
            )
        if self.workers is not None and self.min_workers > self.workers:
            raise UsageError(
                f"min_workers = {self.min_workers} with workers = {self.workers}",
                "the job begins with all of its workers",
                f"give min_workers <= {self.workers}",
            )
        if self.elastic == "off":
            for name, default in (
                ("restarts", 3),
                ("min_workers", 1),
                ("hang_s", 10.0),
                ("stuck_s", 300.0),
                ("lost_round", "auto"),
            ):
                if getattr(self, name) != default:
                    raise UsageError(
                        f"{name} = {getattr(self, name)} with elastic = 'off'",
                        "the first lost worker ends the job then",
                        f"leave out {name}, or elastic",
                    )
        if self.lost_round != "auto":
            self._check_lost_round()
        if self.on_divergence == "mend" and not self._can_mend():
            raise UsageError(
                f"on_divergence = 'mend' with strategy = {self.strategy!r}",
                "what is mended is there as often as there are workers",
                "leave out --on-divergence, or use a strategy whose workers hold whole models",
            )
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise UsageError(
                f"micro_batch = {self.micro_batch} with global_batch = {self.global_batch}",
                "a micro-batch is a part of the global batch",
                f"give micro_batch <= {self.global_batch}",
            )
        if self.micro_batch is not None and self.micro_batch > (self.device_batch or self.micro_batch):
            raise UsageError(
                f"micro_batch = {self.micro_batch} with device_batch = {self.device_batch}",
                "a micro-batch is computed in one forward pass",
                f"give a --micro-batch of at most {self.device_batch}, or a larger --device-batch",
            )
        if self.shares is not None:
            if self.workers is not None and len(self.shares) != self.workers:
                raise UsageError(
                    f"shares = {list(self.shares)} for {self.workers} workers",
                    "each worker has one share",
                    "give as many",
                )
            if not all(0 <= share < math.inf for share in self.shares) or sum(self.shares) <= 0:
                raise UsageError(
                    f"shares = {list(self.shares)}", "shares are finite, not negative and not all zero", ""
                )
        if self.inner_steps == "fixed" and not self.strategy.local:
            raise UsageError(
                f"inner_steps = 'fixed' with strategy = {self.strategy!r}",
                "only methods between whose agreements workers go their own way take local steps",
                "leave out --inner-steps, or use a strategy such as diloco",
            )
        if self.order != "shuffled" and not self.needs.labelled:
            raise UsageError(
                f"order = {self.order!r} with task = {self.task_name!r}",
                "rows of running text have one length and no class",
                "leave out --order, or use --task classify",
            )
        if self.eval_data and self.eval_fraction not in (0.05, 0.0):
            raise UsageError(
                f"eval_fraction = {self.eval_fraction} with eval_data",
                "held-out rows come from one of them",
                "leave out --eval-fraction",
            )

    def _check_lost_round(self) -> None:
        strategy = self.strategy
        if not strategy.local:
            raise UsageError(
                f"lost_round = {self.lost_round!r} with strategy = {strategy!r}",
                "only local steps have rounds",
                "leave out --lost-round (a lost worker's part of a step is computed by the others), or use diloco",
            )
        cadence: Any = strategy.cadence
        whole = cadence.fragments == 1 and not cadence.delay and not strategy.keep_local
        if self.lost_round == "redo" and (not whole or getattr(strategy.exchange, "by_model", False)):
            raise UsageError(
                f"lost_round = 'redo' with strategy = {strategy!r}",
                "where fragments or pairs agree at different times there is no common point to go on from",
                "leave out --lost-round (the round is dropped), or use diloco",
            )

    @property
    def shares_memory(self) -> bool:
        """Whether shared memory alone can join the workers."""
        return self.transport == "shared" or getattr(self.strategy.placement, "needs_shared_memory", False)

    def _can_mend(self) -> bool:
        method = self.strategy.placement.method
        whole = method is None or method == "manyhands.train.sharded_optimizer:ShardedOptimizer"
        return whole and not getattr(self.strategy.exchange, "by_model", False)

    def _adds_raw_gradients(self) -> bool:
        """Whether the strategy is plain all-reduce at every step, which the fixed order can stand for."""
        strategy, exchange = self.strategy, self.strategy.exchange
        plain = isinstance(exchange, Ordered) or (
            isinstance(exchange, AllReduce) and exchange.precision == "as-is"
        )
        every = isinstance(strategy.cadence, EveryStep)
        return plain and every and strategy.inner is None and strategy.placement.method is None

    @property
    def sinks(self) -> tuple[str, ...]:
        """The names in `report_to`; "none" is Hugging Face's word for no further sink."""
        return tuple(name for name in self.report_to if name != "none")

    @property
    def needs(self) -> Needs:
        """What the task needs of rows and models."""
        return needs_of(self.task)

    @property
    def task_name(self) -> str:
        from manyhands.core.registry import name_of

        return name_of("tasks", type(self.task))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} = {value}", f"it is at least {least}", f"give {name} >= {least}")
