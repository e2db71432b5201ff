"""Names for things, one line each, imported only when used.

A plugin is one new file and one line here. Third parties add theirs by an entry point in the group
``manyhands.<kind>``, for example in their pyproject.toml::

    [project.entry-points."manyhands.exchanges"]
    my-codec = "my_package.codec:MyCodec"      # help: the first line of its docstring
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import lru_cache
from typing import Any, NamedTuple

from manyhands.core.errors import UsageError, nearest


class Entry(NamedTuple):
    """One registered name.

    Attributes:
        target: ``module:attribute``, imported on first use.
        help: one line for `manyhands list`; empty for third-party entries until asked for.
    """

    target: str
    help: str


REGISTRY: dict[str, dict[str, Entry]] = {
    "strategies": {
        "ddp": Entry("manyhands.strategy.presets:ddp", "all-reduce of gradients at every step, in buckets"),
        "accumulate": Entry(
            "manyhands.strategy.presets:accumulate", "one update of the gradients of several global batches"
        ),
        "hierarchical": Entry(
            "manyhands.strategy.presets:hierarchical", "all-reduce within hosts, then across them, compressed"
        ),
        "powersgd": Entry(
            "manyhands.strategy.presets:powersgd", "gradients as matrices of low rank (arXiv:1905.13727)"
        ),
        "local-sgd": Entry(
            "manyhands.strategy.presets:local_sgd", "steps of one's own, then the models are averaged"
        ),
        "post-local-sgd": Entry(
            "manyhands.strategy.presets:post_local_sgd", "synchronous at first, then local steps"
        ),
        "slowmo": Entry(
            "manyhands.strategy.presets:slowmo", "local steps under a slow momentum (arXiv:1910.00643)"
        ),
        "diloco": Entry(
            "manyhands.strategy.presets:diloco", "local AdamW, rare Nesterov steps (arXiv:2311.08105)"
        ),
        "streaming-diloco": Entry(
            "manyhands.strategy.presets:streaming_diloco",
            "DiLoCo in overlapped fragments of 4 bits (arXiv:2501.18512)",
        ),
        "muloco": Entry(
            "manyhands.strategy.presets:muloco", "DiLoCo with Muon inside, 2 bits (arXiv:2505.23725)"
        ),
        "sparseloco": Entry(
            "manyhands.strategy.presets:sparseloco", "local steps, top-k in 2 bits (arXiv:2508.15706)"
        ),
        "demo": Entry(
            "manyhands.strategy.presets:demo",
            "local momentum, its largest DCT parts travel (arXiv:2411.19870)",
        ),
        "gossip": Entry(
            "manyhands.strategy.presets:gossip", "local steps, averages in pairs (NoLoCo, arXiv:2506.10911)"
        ),
        "eager": Entry(
            "manyhands.strategy.presets:eager", "all-reduce used one step later, with a corrected forecast"
        ),
        "forecast": Entry(
            "manyhands.strategy.presets:forecast",
            "local steps as a forecast: the gradients of several steps agree, and replace them",
        ),
        "hogwild": Entry(
            "manyhands.strategy.presets:hogwild", "one copy of the parameters, lock-free (arXiv:1106.5730)"
        ),
        "zero1": Entry(
            "manyhands.strategy.zero:zero1", "ddp with the optimizer's state divided among workers"
        ),
        "zero2": Entry("manyhands.strategy.zero:zero2", "gradients and optimizer state divided (FSDP2)"),
        "zero3": Entry(
            "manyhands.strategy.zero:zero3", "parameters, gradients and optimizer state divided (FSDP2)"
        ),
        "parameter-server": Entry(
            "manyhands.strategy.served:parameter_server",
            "parameters on servers: sync, bounded(s) or async; several servers, TLS, durable",
        ),
    },
    "exchanges": {
        "all-reduce": Entry(
            "manyhands.exchange.allreduce:AllReduce", "Σ of everybody's contribution, in buckets"
        ),
        "ordered": Entry(
            "manyhands.exchange.ordered:Ordered",
            "micro-batches added in one fixed tree: bitwise the same for any workers",
        ),
        "bf16": Entry(
            "manyhands.exchange.half:BF16", "2 bytes a value: float32's range, 8 bits of precision"
        ),
        "fp16": Entry("manyhands.exchange.half:FP16", "2 bytes a value: 11 bits of precision up to 65,504"),
        "int8": Entry("manyhands.exchange.int8:Int8", "1 byte a value: 255 levels in each block of 256"),
        "int4": Entry("manyhands.exchange.int4:Int4", "4 bits a value: 15 levels in each block of 256"),
        "int2": Entry(
            "manyhands.exchange.int2:Int2", "2 bits a value: ±1/3 and ±1 of the block's largest, no zero"
        ),
        "ternary": Entry(
            "manyhands.exchange.ternary:Ternary",
            "1.6 bits a value, unbiased: −1, 0 or 1 times the block's largest (TernGrad)",
        ),
        "sign": Entry(
            "manyhands.exchange.sign:Sign", "1 bit a value: the sign times the block's mean magnitude; biased"
        ),
        "natural": Entry(
            "manyhands.exchange.natural:Natural", "1 byte a value, unbiased: powers of two (arXiv:1905.10988)"
        ),
        "error-feedback": Entry(
            "manyhands.exchange.feedback:ErrorFeedback", "what was not sent is added to the next contribution"
        ),
        "ef21": Entry(
            "manyhands.exchange.ef21:EF21", "compressed changes of the contribution (arXiv:2106.05203)"
        ),
        "momentum": Entry(
            "manyhands.exchange.momentum:Momentum", "momentum before a sparsifier (DGC, arXiv:1712.01887)"
        ),
        "two-phase": Entry(
            "manyhands.exchange.twophase:TwoPhase",
            "codes of chunks: bytes independent of the number of workers",
        ),
        "hierarchical": Entry(
            "manyhands.exchange.hierarchical:Hierarchical", "within each host, then across hosts by slices"
        ),
        "by-tensor": Entry(
            "manyhands.exchange.bytensor:ByTensor",
            "one exchange for large tensors, another for small or named ones",
        ),
        "warmup": Entry("manyhands.exchange.warmup:Warmup", "all-reduce at first, then another"),
        "chain": Entry("manyhands.exchange.chain:Chain", "two codecs, the second for what the first left"),
        "gossip": Entry("manyhands.exchange.gossip:Gossip", "pairs average their models (arXiv:2506.10911)"),
        "auto": Entry("manyhands.exchange.auto:Auto", "compress only where measurement says it is faster"),
        "topk": Entry(
            "manyhands.exchange.topk:TopK",
            "the largest entries of each chunk, or of all by a sampled threshold",
        ),
        "randomk": Entry(
            "manyhands.exchange.randomk:RandomK",
            "the same random entries on all workers: values travel alone",
        ),
        "threshold": Entry(
            "manyhands.exchange.threshold:Threshold", "all entries that reach a value, absolute or relative"
        ),
        "countsketch": Entry(
            "manyhands.exchange.countsketch:CountSketch",
            "the largest entries of the sum, found by summed sketches",
        ),
        "fetchsgd": Entry(
            "manyhands.exchange.fetchsgd:FetchSGD", "momentum and what is held back inside a sketch"
        ),
        "powersgd": Entry("manyhands.exchange.powersgd:PowerSGD", "matrices as products of two thin ones"),
        "dct-topk": Entry(
            "manyhands.exchange.dct:DctTopK", "the strongest frequencies of each 64 × 64 block (DeMo)"
        ),
    },
    "cadences": {
        "every-step": Entry("manyhands.cadence.every:EveryStep", "agree after each step"),
        "every": Entry("manyhands.cadence.every:Every", "agree after every H-th step; local steps between"),
        "post-local": Entry(
            "manyhands.cadence.every:PostLocal", "each step at first, then every H-th (arXiv:1808.07217)"
        ),
        "staggered": Entry(
            "manyhands.cadence.staggered:Staggered", "fragments in turn, overlapped (arXiv:2501.18512)"
        ),
        "delayed": Entry(
            "manyhands.cadence.delayed:Delayed", "use each agreement one step later, overlapped with it"
        ),
        "forecast": Entry(
            "manyhands.cadence.forecast:Forecast",
            "agree on the gradients of several steps; walk ahead meanwhile",
        ),
    },
    "placements": {
        "replicated": Entry(
            "manyhands.placement.replicated:Replicated", "every worker holds the whole model"
        ),
        "shared-memory": Entry(
            "manyhands.placement.shared:SharedMemory", "one copy for all workers of a machine (Hogwild)"
        ),
        "sharded": Entry(
            "manyhands.placement.sharded:Sharded", "one model divided among the workers of a group (ZeRO)"
        ),
        "served": Entry(
            "manyhands.placement.served:Served",
            "on parameter servers: workers push gradients and pull parameters",
        ),
    },
    "optimizers": {
        "sgd": Entry(
            "manyhands.strategy.optimizers:SGD", "stochastic gradient descent, with momentum and Nesterov"
        ),
        "adam": Entry("manyhands.strategy.optimizers:Adam", "Adam (arXiv:1412.6980)"),
        "adamw": Entry(
            "manyhands.strategy.optimizers:AdamW", "Adam with decoupled weight decay (arXiv:1711.05101)"
        ),
        "signsgd": Entry(
            "manyhands.strategy.sign:SignSGD", "steps of one size along the sign (arXiv:1802.04434)"
        ),
        "adagrad": Entry(
            "manyhands.strategy.optimizers:Adagrad", "per-coordinate rates from summed squares (Duchi 2011)"
        ),
        "rmsprop": Entry(
            "manyhands.strategy.optimizers:RMSprop", "per-coordinate rates from a running mean square"
        ),
        "adafactor": Entry(
            "manyhands.strategy.optimizers:Adafactor", "factored second moments (arXiv:1804.04235)"
        ),
        "muon": Entry(
            "manyhands.strategy.optimizers:Muon",
            "orthogonalised momentum for matrices, AdamW for the rest (Jordan 2024)",
        ),
        "delayed-nesterov": Entry(
            "manyhands.strategy.delayed_nesterov:DelayedNesterov",
            "momentum renewed after every N-th update: for asynchronous pushes (arXiv:2401.09135)",
        ),
    },
    "schedules": {
        "constant": Entry("manyhands.strategy.schedules:Constant", "warm-up, then a constant rate"),
        "linear": Entry(
            "manyhands.strategy.schedules:Linear", "warm-up, then down to a floor in a straight line"
        ),
        "cosine": Entry(
            "manyhands.strategy.schedules:Cosine", "warm-up, then down to a floor along a half cosine"
        ),
        "wsd": Entry("manyhands.strategy.schedules:WSD", "warm-up, stable, then a linear decay at the end"),
    },
    "tasks": {
        "pretrain": Entry("manyhands.tasks.pretrain:Pretrain", "causal language model over packed text"),
        "classify": Entry("manyhands.tasks.classify:Classify", "one label for each text"),
    },
    "models": {
        "gpt2-nano": Entry(
            "manyhands.models.presets:GPT2_NANO", "GPT-2, 2 layers × 64: 0.1M parameters without embeddings"
        ),
        "gpt2-micro": Entry(
            "manyhands.models.presets:GPT2_MICRO", "GPT-2, 4 layers × 128: 0.8M without embeddings"
        ),
        "gpt2-mini": Entry(
            "manyhands.models.presets:GPT2_MINI", "GPT-2, 6 layers × 384: 10.6M without embeddings"
        ),
        "gpt2-small": Entry("manyhands.models.presets:GPT2_SMALL", "GPT-2, 12 layers × 768: the 124M model"),
        "gpt2-medium": Entry(
            "manyhands.models.presets:GPT2_MEDIUM", "GPT-2, 24 layers × 1,024: the 355M model"
        ),
        "llama-nano": Entry(
            "manyhands.models.presets:LLAMA_NANO", "Llama, 2 layers × 64: 0.1M without embeddings"
        ),
        "llama-micro": Entry(
            "manyhands.models.presets:LLAMA_MICRO", "Llama, 4 layers × 128: 0.8M without embeddings"
        ),
        "llama-mini": Entry(
            "manyhands.models.presets:LLAMA_MINI", "Llama, 6 layers × 384: 9.4M without embeddings"
        ),
        "llama-small": Entry(
            "manyhands.models.presets:LLAMA_SMALL", "Llama, 12 layers × 768: 75M without embeddings"
        ),
        "llama-1b": Entry(
            "manyhands.models.presets:LLAMA_1B", "Llama, 16 layers × 2,048: the shape of Llama 3.2 1B"
        ),
        "bert-tiny": Entry(
            "manyhands.models.presets:BERT_TINY", "BERT encoder, 2 layers × 128, for classification"
        ),
        "bert-mini": Entry(
            "manyhands.models.presets:BERT_MINI", "BERT encoder, 4 layers × 256, for classification"
        ),
        "tutorial": Entry(
            "manyhands.models.tutorial:TutorialClassifier",
            "text classifier: embedding 300, mean, 256 ReLU units, classes",
        ),
    },
    "launchers": {
        "local": Entry("manyhands.launch.launchers:locally", "this machine: one process per core or GPU"),
        "torchrun": Entry(
            "manyhands.launch.launchers:joined",
            "join as one worker where RANK and WORLD_SIZE are set (torchrun, others)",
        ),
    },
    "sinks": {
        "tensorboard": Entry(
            "manyhands.train.sinks:TensorBoard", "scalars for TensorBoard under OUTPUT/tensorboard (extra)"
        ),
    },
}


@lru_cache
def entries(kind: str) -> dict[str, Entry]:
    """All names of a kind: ours, then third parties'. Ours cannot be overridden."""
    if kind not in REGISTRY:
        raise UsageError(f"{kind!r} is not a kind of thing", "", nearest(kind, REGISTRY))
    found = dict(REGISTRY[kind])
    for point in importlib.metadata.entry_points(group=f"manyhands.{kind}"):
        if point.name in REGISTRY[kind]:
            raise UsageError(
                f"entry point {point.name!r} ({point.value}) takes a built-in name of {kind}",
                "names are unique",
                "uninstall that package or rename its entry point",
            )
        found[point.name] = Entry(point.value, "")
    return found


def resolve(kind: str, name: str) -> Any:
    """The thing itself: imports its module. Raises `UsageError` naming the nearest match."""
    known = entries(kind)
    key = name.replace("_", "-")
    if key not in known:
        raise UsageError(f"{name!r} is not among the {kind}", "", nearest(key, known))
    return resolve_target(known[key].target)


def resolve_target(target: str) -> Any:
    """What ``module:attribute`` names; imports the module."""
    module, _, attribute = target.partition(":")
    thing: Any = importlib.import_module(module)
    for part in attribute.split("."):
        thing = getattr(thing, part)
    return thing


def name_of(kind: str, thing: type) -> str:
    """The registered name of a class (the inverse of `resolve`)."""
    target = f"{thing.__module__}:{thing.__qualname__}"
    for name, entry in entries(kind).items():
        if entry.target == target:
            return name
    raise UsageError(
        f"{target} is not registered among the {kind}",
        "a value that is to be written to a configuration needs a name",
        f"register it by an entry point in the group 'manyhands.{kind}'",
    )


def help_of(kind: str, name: str) -> str:
    """One line of help; a third party's comes from its docstring, a module:function's from itself."""
    entry = entries(kind)[name]
    if entry.help:
        return entry.help
    return (resolve(kind, name).__doc__ or "").strip().split("\n")[0]
