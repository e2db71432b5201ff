"""One value, four spellings, one round trip; mistakes name the nearest match."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.cadence.every import EveryStep
from manyhands.cli import options
from manyhands.cli.train import assemble, parser
from manyhands.core import config
from manyhands.core.callform import parse
from manyhands.core.errors import UsageError
from manyhands.exchange.allreduce import AllReduce
from manyhands.exchange.ordered import Ordered
from manyhands.launch.job import told_once
from manyhands.strategy import presets
from manyhands.strategy.base import Strategy
from manyhands.strategy.optimizers import SGD, AdamW, Muon
from manyhands.strategy.schedules import WSD, Cosine
from manyhands.train.job import Job

rates = st.floats(1e-6, 10.0)
optimizers = st.one_of(
    st.builds(
        AdamW,
        rates,
        weight_decay=st.floats(0, 1),
        schedule=st.builds(Cosine, warmup=st.sampled_from([0.0, 0.1, 20.0])),
    ),
    st.builds(SGD, rates, momentum=st.floats(0, 0.99)),
    st.builds(Muon, rates, schedule=st.just(WSD())),
)
exchanges = st.one_of(
    st.builds(
        AllReduce, bucket_mb=st.floats(0.1, 100), precision=st.sampled_from(["as-is", "bf16", "fp16", "fp32"])
    ),
    st.builds(Ordered),
)
strategies = st.builds(Strategy, exchange=exchanges, outer=optimizers, cadence=st.just(EveryStep()))


@settings(deadline=None)  # the first example imports
@given(strategy=strategies)
def test_a_strategy_survives_every_spelling(
    strategy: Strategy, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert config.from_text("strategies", repr(strategy)) == strategy
    data = json.loads(json.dumps(config.to_data(strategy, "strategies")))
    assert config.from_choice("strategies", data, "strategy") == strategy
    job = Job(strategy=strategy)
    path = tmp_path_factory.mktemp("toml") / "job.toml"
    path.write_text(config.to_toml(job))
    assert config.assemble(Job, [("file", config.read_toml(str(path)))])[0] == job
    assert config.from_data(Job, json.loads(json.dumps(config.to_data(job)))) == job


def test_call_form_is_read_as_data() -> None:
    job, origins = config.assemble(Job, [("--strategy", {"strategy": "ddp(lr=3e-4, bucket_mb=8)"})])
    assert job.strategy == presets.ddp(lr=3e-4, bucket_mb=8)
    assert origins == {"strategy": "--strategy"}
    assert config.from_text("strategies", "ddp(weight-decay=0.1)") == presets.ddp(weight_decay=0.1)
    with pytest.raises(UsageError, match="weight_dekay"):
        config.from_text("strategies", "ddp(weight-dekay=0.1)")


def test_layers_win_in_order_and_are_remembered() -> None:
    job, origins = config.assemble(
        Job,
        [
            ("run.toml", {"strategy": {"outer": {"kind": "adamw", "lr": 1e-3}}, "steps": 5}),
            ("--set strategy.outer.lr", {"strategy.outer.lr": "6e-4"}),
            ("--steps", {"steps": "7"}),
        ],
    )
    assert job.strategy.outer.lr == 6e-4
    assert job.steps == 7
    assert origins["strategy.outer.lr"] == "--set strategy.outer.lr"
    assert origins["steps"] == "--steps"


def test_a_part_of_a_default_can_be_changed() -> None:
    job, _ = config.assemble(Job, [("--set", {"strategy.exchange.bucket_mb": "4"})])
    assert job.strategy == dataclasses.replace(Job().strategy, exchange=AllReduce(bucket_mb=4.0))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"global_bach": 3}, "did you mean 'global_batch'"),
        ({"strategy": "dpp"}, "did you mean 'ddp'"),
        ({"strategy": "ddp(bucket=3)"}, "did you mean 'bucket_mb'"),
        ({"strategy": "ddp(lr='fast')"}, "strategy.lr: 'fast'. it must be a number"),
        ({"strategy": "ddp(3e-4)"}, "a preset's parameters are named"),
        ({"strategy": "__import__('os').system('true')"}, "nothing is evaluated"),
        ({"strategy": "ddp(lr=1+1)"}, "nothing is evaluated"),
        ({"strategy": "ddp(lr=(lambda: 1)())"}, "nothing is evaluated"),
        ({"strategy": "ddp(lr=1, lr=2)"}, "repeated|nothing is evaluated"),
        ({"strategy": "ddp("}, "cannot be read"),
        ({"strategy.outer.rate": "1"}, "did you mean|lr"),
        ({"strategy.inner.lr": "1"}, "has no part 'inner'"),
        ({"steps": "many"}, "steps: 'many'. it must be a whole number"),
        ({"steps": "2.5"}, "it must be a whole number"),
        ({"steps": "0"}, "it is at least 1"),
        ({"reproducible": "perhaps"}, "it must be true or false"),
        ({"precision": "bf61"}, "did you mean 'bf16'"),
        ({"task": "clasify"}, "did you mean 'classify'"),
        ({"micro_batch": 9, "global_batch": 4}, "micro_batch <= 4"),
        ({"steps": 3, "epochs": 1}, "leave one out"),
        ({"shares": "1,2", "workers": 3}, "each worker has one share"),
        ({"data": [""]}, "data holds an empty name"),
        ({"eval_data": ["a.txt", ""]}, "eval_data holds an empty name"),
        ({"output": ""}, "output holds an empty name"),
        ({"resume": ""}, "resume holds an empty name"),
        ({"output": "run\udcff"}, r"output = 'run\\udcff'. names are kept in config.toml"),
        ({"data": ["t.txt", "run.toml"]}, r"data names run.toml.*manyhands train run.toml --data"),
        ({"eval_every": 5, "eval_fraction": 0}, "eval_every = 5 with eval_fraction = 0"),
        ({"task": "classify", "prompt": "x"}, "prompt = 'x' with task = 'classify'"),
        ({"document": "line", "format": "csv"}, "document = 'line' with format = 'csv'"),
    ],
)
def test_mistakes_are_one_clear_message(layer: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        config.assemble(Job, [("here", layer)])
    import re

    assert re.search(words, str(caught.value)), str(caught.value)
    assert caught.value.exit_code == 2


def test_what_is_meant_is_let_through() -> None:
    for layer in (
        {"data": ["conf/*.toml"]},
        {"data": ["run.toml"], "format": "text"},
        {"eval_every": 5, "eval_fraction": 0, "eval_data": ["held.txt"]},
        {"task": "classify", "prompt": ""},
        {"document": "line", "format": "text"},
    ):
        config.assemble(Job, [("here", layer)])


def test_the_global_batch_is_not_said_twice(tmp_path: Path) -> None:
    job = tmp_path / "run.toml"
    job.write_text("global_batch = 6\n")
    product = ("--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "4", "--workers", "1")
    line = options.parse(parser(), [str(job), *product])
    made, origins = assemble(line)  # the command line goes before a file
    assert made.global_batch == 8
    assert "accumulation" in origins["global_batch"]
    for said in (("--global-batch", "6"), ("--set", "global_batch=6"), ("--set", "global-batch=6")):
        with pytest.raises(UsageError, match="accumulation follows from it"):
            assemble(options.parse(parser(), [*product, *said]))


def test_toml_mistakes_name_the_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("steps = = 3\n")
    with pytest.raises(UsageError, match=r"bad\.toml"):
        config.read_toml(str(bad))
    with pytest.raises(UsageError, match="does not exist"):
        config.read_toml(str(tmp_path / "absent.toml"))


@given(st.text(max_size=40))
def test_no_text_can_do_harm(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse(text)


def _assembled(*layers: dict[str, Any]) -> Any:
    return config.assemble(Job, [(f"--set {i}", layer) for i, layer in enumerate(layers)])[0].strategy


def test_another_kind_does_not_inherit_the_old_ones_options() -> None:
    assert type(_assembled({"strategy.exchange.kind": "topk"}).exchange).__name__ == "TopK"


def test_parts_of_a_call_form_can_be_changed() -> None:
    changed = _assembled(
        {"strategy.exchange": "error-feedback(int8)"}, {"strategy.exchange.inner.block": "64"}
    )
    assert changed.exchange.inner.block == 64


def test_shorthands_mean_the_optimizer_that_trains() -> None:
    rate = {"strategy.main.lr": "4e-4"}
    assert _assembled(rate).outer.lr == 4e-4
    local = _assembled({"strategy": "diloco"}, rate)
    assert (local.inner.lr, local.outer.lr) == (4e-4, 0.7)


def test_an_empty_text_is_a_text() -> None:
    assert config.assemble(Job, [("--prompt", {"prompt": ""})])[0].prompt == ""
    assert config.assemble(Job, [("--prompt", {"prompt": "none"})])[0].prompt is None


@pytest.mark.parametrize(
    ("below", "above", "left"),
    [
        ({"steps": 8}, {"epochs": 2.0}, {"epochs": 2.0}),
        ({"epochs": 2.0}, {"steps": 8}, {"steps": 8}),
        ({"steps": 8}, {"steps": 9}, {"steps": 9}),
        ({"device_batch": 4}, {"reproducible": "true"}, {"reproducible": True}),
        ({"device_batch": 4}, {"reproducible": "false"}, {"device_batch": 4}),
        ({"steps": 8}, {"steps": "none", "epochs": 1.0}, {"epochs": 1.0}),
    ],
)
def test_a_higher_layer_takes_back_what_it_excludes(
    below: dict[str, Any], above: dict[str, Any], left: dict[str, Any]
) -> None:
    """A run's own configuration says steps and derived values: nobody has to take them back by hand."""
    job, _ = config.assemble(Job, told_once([("config.toml", below), ("--", above)]))
    expected = config.assemble(Job, [("here", left)])[0]
    for name in ("steps", "epochs", "device_batch", "reproducible"):
        assert getattr(job, name) == getattr(expected, name)


def test_one_layer_that_says_both_is_an_error() -> None:
    with pytest.raises(UsageError, match="both given"):
        config.assemble(Job, told_once([("config.toml", {"steps": 8, "epochs": 2.0})]))


def test_one_command_that_says_both_is_an_error(tmp_path: Path) -> None:
    """Its options are layers of their own: none takes back another."""
    with pytest.raises(UsageError, match="both given"):
        assemble(options.parse(parser(), ["--steps", "8", "--epochs", "2"]))
    with pytest.raises(UsageError, match="both given"):
        assemble(options.parse(parser(), ["--set", "steps=8", "--epochs", "2"]))
    (tmp_path / "job.toml").write_text("steps = 8\n")
    job, _ = assemble(options.parse(parser(), [str(tmp_path / "job.toml"), "--epochs", "2"]))
    assert (job.steps, job.epochs) == (None, 2.0)
