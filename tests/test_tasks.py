"""Tasks: sums and counts that equal any other way of computing them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manyhands.core.errors import DataError, ModelError, UsageError
from manyhands.core.types import Task
from manyhands.data.sample import Order
from manyhands.models.build import build
from manyhands.models.tutorial import TutorialClassifier
from manyhands.strategy.optimizers import AdamW
from manyhands.strategy.schedules import Cosine
from manyhands.tasks import loss as loss_module
from manyhands.tasks.classify import Classify
from manyhands.tasks.loss import cross_entropy_sum
from manyhands.tasks.pretrain import Pretrain

VOCABULARY, SEQ, LABELS = 23, 6, 4


class Bigram(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.wrap = wrap

    def forward(self, tokens: Tensor) -> Any:
        return self.wrap(self.table(tokens))


def gpt() -> nn.Module:
    return build("gpt2-nano", task="pretrain", vocab_size=VOCABULARY, seq_len=SEQ)


def texts(rows: int, ignored: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, SEQ + 1), generator=g)
    targets = ids[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=g) < ignored] = -100
    return {"input_ids": ids[:, :-1], "targets": targets}


def labelled(rows: int, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, SEQ + 1, (rows,), generator=g)
    mask = (torch.arange(SEQ) < lengths[:, None]).long()
    ids = torch.randint(1, VOCABULARY, (rows, SEQ), generator=g) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "label": torch.randint(0, LABELS, (rows,), generator=g),
    }


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return TutorialClassifier(VOCABULARY, LABELS, width=8, hidden=8, dropout=0.0)


TASKS: dict[str, tuple[Any, Callable[[], nn.Module], Callable[..., dict[str, Tensor]], str]] = {
    "pretrain": (Pretrain(), gpt, texts, "targets"),
    "classify": (Classify(), classifier, labelled, "label"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_loss_is_a_sum_and_an_int_that_any_split_adds_up_to(name: str) -> None:
    task, make, data, _ = TASKS[name]
    assert isinstance(task, Task)
    model = make().double()
    batch = data(7)
    whole = task.loss(model, batch)
    whole.loss_sum.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, count = 0.0, 0
    for cut in (slice(0, 1), slice(1, 1), slice(1, 5), slice(5, 7)):
        part = task.loss(model, {k: v[cut] for k, v in batch.items()})
        part.loss_sum.backward()
        total, count = total + float(part.loss_sum.detach()), count + part.count
    assert type(whole.count) is int
    assert count == whole.count > 0
    assert total == pytest.approx(float(whole.loss_sum.detach()), rel=1e-12)
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_nothing_to_learn_is_zero_with_a_graph(name: str) -> None:
    task, make, data, key = TASKS[name]
    model = make()
    empty = task.loss(model, data(0))
    assert (float(empty.loss_sum.detach()), empty.count) == (0.0, 0)
    empty.loss_sum.backward()
    assert all(p.grad is None for p in model.parameters())  # a worker without rows uses no parameter
    batch = data(3)
    batch[key] = torch.full_like(batch[key], -100)
    ignored = task.loss(model, batch)
    assert (float(ignored.loss_sum.detach()), ignored.count) == (0.0, 0)
    ignored.loss_sum.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(float(g.abs().max()) == 0.0 for g in grads)


@pytest.mark.parametrize("name", TASKS)
def test_scores_add_up_over_any_split(name: str) -> None:
    task, make, data, _ = TASKS[name]
    model = make().double().eval()
    batch = data(9)
    whole = task.score(model, batch)
    assert all(v.dtype == torch.float64 for v in whole.values())
    summed: dict[str, Tensor] = {}
    for cut in (slice(0, 4), slice(4, 4), slice(4, 9)):
        for key, value in task.score(model, {k: v[cut] for k, v in batch.items()}).items():
            summed[key] = summed[key] + value if key in summed else value
    a, b = (task.metrics(t, bytes_per_target=3.5) for t in (whole, summed))
    assert a == pytest.approx(b, rel=1e-12)
    sum_and_count = task.loss(model, batch)
    assert a["loss"] == pytest.approx(float(sum_and_count.loss_sum.detach()) / sum_and_count.count)


# ------------------------------------------------------------------------------------------------ pretrain


def test_pretraining_figures_by_hand() -> None:
    task, model, batch = Pretrain(), Bigram().double(), texts(5)
    logits = model(batch["input_ids"]).reshape(-1, VOCABULARY)
    targets = batch["targets"].reshape(-1)
    mean = float(F.cross_entropy(logits, targets, ignore_index=-100).detach())
    hits = (logits.argmax(1) == targets)[targets != -100].double().mean()
    figures = task.metrics(task.score(model, batch), bytes_per_target=2.5)
    assert figures["loss"] == pytest.approx(mean)
    assert figures["perplexity"] == pytest.approx(math.exp(mean))
    assert figures["bits_per_byte"] == pytest.approx(mean / math.log(2) / 2.5)
    assert figures["accuracy"] == pytest.approx(float(hits))
    assert "bits_per_byte" not in task.metrics(task.score(model, batch), bytes_per_target=0.0)


def test_the_loss_is_transformers_own() -> None:
    model = gpt().double()
    ids = torch.randint(0, VOCABULARY, (3, SEQ))
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    ours = Pretrain().loss(model, {"input_ids": ids, "targets": targets})
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert (
        float((ours.loss_sum / ours.count - theirs).detach().abs()) < 1e-6
    )  # theirs rounds logits to float32


def test_no_valid_target_has_no_score() -> None:
    zero = {k: torch.zeros(()) for k in ("loss_sum", "count", "correct")}
    with pytest.raises(DataError, match="0 valid targets"):
        Pretrain().metrics(zero, bytes_per_target=1.0)
    with pytest.raises(DataError, match="0 labelled rows"):
        Classify().metrics(zero, bytes_per_target=1.0)
    huge = {"loss_sum": torch.tensor(1e4), "count": torch.tensor(1.0), "correct": torch.tensor(0.0)}
    assert Pretrain().metrics(huge, bytes_per_target=1.0)["perplexity"] == math.inf


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: SimpleNamespace(logits=x),
        lambda x: {"logits": x},
        lambda x: (x, "more"),
    ],
    ids=["tensor", "object", "dict", "tuple"],
)
def test_any_module_is_a_model(wrap: Callable[[Tensor], Any]) -> None:
    batch = texts(3)
    expected = Pretrain().loss(Bigram(), batch)
    found = Pretrain().loss(Bigram(wrap), batch)
    assert torch.equal(expected.loss_sum, found.loss_sum)
    through = Pretrain().loss(lambda input_ids: Bigram(wrap)(input_ids), batch)  # type: ignore[arg-type]
    assert torch.equal(expected.loss_sum, through.loss_sum)


@pytest.mark.parametrize("wrap", [lambda x: x[:, :-1], lambda x: x.sum(-1), lambda x: "nothing"])
def test_what_is_not_logits_is_refused_by_shape(wrap: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ModelError, match=r"shape \[2, 6\].*logits have shape \[2, 6, classes\]"):
        Pretrain().loss(Bigram(wrap), texts(2))


# -------------------------------------------------------------------------------------------- the loss itself


@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 50),
    seed=st.integers(0, 1000),
    block_bytes=st.sampled_from([1, 512, 1 << 20]),
)
@settings(max_examples=60, deadline=None)
def test_cross_entropy_is_pytorchs(rows: int, classes: int, seed: int, block_bytes: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=g, dtype=torch.float64) * 5).requires_grad_()
    targets = torch.randint(0, classes, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < 0.3] = -100
    plain = logits.detach().clone().requires_grad_()
    F.cross_entropy(plain, targets, ignore_index=-100, reduction="sum").mul(0.5).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss_module.BLOCK_BYTES, "cpu", block_bytes)
        ours = cross_entropy_sum(logits, targets)
        (ours * 0.5).backward()
    expected = F.cross_entropy(logits.detach(), targets, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, plain.grad, rtol=1e-10, atol=1e-12)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(300, 1000) * 3).bfloat16().requires_grad_()
    targets = torch.randint(0, 1000, (300,))
    ours = cross_entropy_sum(logits, targets)
    ours.backward()
    exact = logits.detach().double().requires_grad_()
    reference = F.cross_entropy(exact, targets, reduction="sum")
    reference.backward()
    assert ours.dtype == torch.float32
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert float((logits.grad.double() - exact.grad).abs().max()) < 2**-8


def test_a_loss_under_autocast_is_float32_and_near() -> None:
    model, batch = gpt(), texts(4)
    plain = Pretrain().loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Pretrain().loss(model, batch)
    cast.loss_sum.backward()
    assert cast.loss_sum.dtype == torch.float32
    assert float(cast.loss_sum.detach()) == pytest.approx(float(plain.loss_sum.detach()), rel=0.02)


def test_what_is_not_finite_in_an_ignored_row_harms_nobody() -> None:
    logits = torch.randn(3, 5)
    logits[1] = math.nan
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, torch.tensor([1, -100, 2]))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


# ------------------------------------------------------------------------------------------------ classify


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_accuracy_and_macro_f1_are_scikit_learns(classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(classes)
    for rows in (3, 40, 200):  # with 3 rows some classes do not occur
        labels, predictions = rng.integers(0, classes, (2, rows))

        class Oracle(nn.Module):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                return F.one_hot(input_ids[:, 0], classes).double() * 9

        batch = {
            "input_ids": torch.tensor(predictions)[:, None],
            "attention_mask": torch.ones(rows, 1, dtype=torch.int64),
            "label": torch.tensor(labels),
        }
        figures = Classify().metrics(Classify().score(Oracle(), batch), bytes_per_target=1.0)
        assert figures["accuracy"] == metrics.accuracy_score(labels, predictions)
        assert figures["macro_f1"] == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
        assert set(figures) == {"loss", "accuracy", "macro_f1"}


def test_unlabelled_rows_are_not_scored() -> None:
    model, batch = classifier().eval(), labelled(8)
    some = {**batch, "label": batch["label"].clone()}
    some["label"][5:] = -100
    first = {k: v[:5] for k, v in batch.items()}
    a, b = (Classify().score(model, x) for x in (some, first))
    assert all(torch.allclose(a[k], b[k]) for k in a)
    assert int(a["confusion"].sum()) == 5


def test_columns_are_two() -> None:
    with pytest.raises(UsageError, match="two columns"):
        Classify(text="x", label="x")


def test_padding_changes_nothing() -> None:
    for model in (
        classifier(),
        build("bert-tiny", task="classify", vocab_size=VOCABULARY, seq_len=16, n_labels=4),
    ):
        model.double().eval()
        batch = labelled(6)
        wide = {**batch, **{k: F.pad(batch[k], (0, 7)) for k in ("input_ids", "attention_mask")}}
        a, b = (float(Classify().loss(model, x).loss_sum.detach()) for x in (batch, wide))
        assert a == pytest.approx(b, rel=1e-9)


def test_the_tutorial_classifier_learns_film_reviews(
    shared_data: Path, request: pytest.FixtureRequest
) -> None:
    """mr_polarity from scratch, a seeded 90/10 split: 75% of the held-out reviews after four epochs."""
    reviews = []
    for label, name in enumerate(("neg", "pos")):
        text = (shared_data / "mr_polarity" / f"rt-polarity.{name}").read_text(encoding="latin-1")
        reviews += [(line.split(), label) for line in text.split("\n") if line.strip()]
    shuffled = [reviews[i] for i in np.random.default_rng(0).permutation(len(reviews))]
    held_out, kept = shuffled[: len(reviews) // 10], shuffled[len(reviews) // 10 :]
    words: dict[str, int] = {}
    for review, _ in kept:
        for word in review:
            words[word] = words.get(word, 0) + 1
    frequent = sorted(words, key=lambda w: -words[w])[:9998]
    number = {w: i + 2 for i, w in enumerate(frequent)}  # 0: padding, 1: rare

    def batch(rows: list[tuple[list[str], int]]) -> dict[str, Tensor]:
        ids = [torch.tensor([number.get(w, 1) for w in review]) for review, _ in rows]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        label = torch.tensor([label for _, label in rows])
        return {"input_ids": padded, "attention_mask": (padded > 0).long(), "label": label}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is not faster with more, and much slower on a busy machine
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    model = build("tutorial", task="classify", vocab_size=10_000, seq_len=64, n_labels=2, seed=0)
    spec = AdamW(2e-3, schedule=Cosine())
    optimizer = spec.build(list(model.named_parameters()), "cpu")
    order = Order(len(kept), 64, seed=0)
    task, total = Classify(), 4 * order.steps_per_epoch
    for step in range(total):
        optimizer.set_lr(spec.schedule.factor(step, total))
        optimizer.zero_grad()
        summed = task.loss(model, batch([kept[i] for i in order.ids(step)]))
        (summed.loss_sum / summed.count).backward()
        optimizer.step()
    figures = task.metrics(task.score(model.eval(), batch(held_out)), bytes_per_target=1.0)
    assert figures["accuracy"] >= 0.75, figures
    assert figures["macro_f1"] >= 0.75, figures


def test_a_part_called_module_does_not_say_what_the_whole_takes() -> None:
    """As a wrapper of PyTorch's would."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Embedding(6, 3)  # its forward takes no mask

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return (self.module(input_ids) * attention_mask.unsqueeze(-1)).sum(1)

    ids, mask = torch.arange(6).reshape(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask, "label": torch.tensor([0, 2])}
    model = Whole()
    expected = torch.nn.functional.cross_entropy(model(ids, mask), batch["label"], reduction="sum")
    for whole in (model, nn.DataParallel(model), torch.compile(nn.DataParallel(model), backend="eager")):
        torch.testing.assert_close(Classify().loss(whole, batch).loss_sum, expected)
