"""Models: built the same from the same seed, checked against tokenizer and task, saved without pickle."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyhands.core.callform import Call, parse
from manyhands.core.errors import ModelError, UsageError
from manyhands.core.registry import REGISTRY, resolve
from manyhands.data import tokenize
from manyhands.models import fit, store
from manyhands.models.build import (
    build,
    describe,
    draws_random,
    load_model,
    load_weights,
    save_model,
    split_call,
)
from manyhands.models.presets import Preset
from manyhands.models.same import difference
from manyhands.train.job import Job
from manyhands.train.material import tokenizer_for

SMALL = {"gpt2-nano", "gpt2-micro", "llama-nano", "llama-micro", "bert-tiny", "bert-mini", "tutorial"}


def make(name: str, task: str = "pretrain", **more: Any) -> nn.Module:
    given: dict[str, Any] = {"vocab_size": 50, "seq_len": 16, "n_labels": 3, **more}
    return build(name, task=task, **given)


def task_of(name: str) -> str:
    return "classify" if name.startswith(("bert", "tutorial")) else "pretrain"


def run(model: nn.Module, task: str = "pretrain") -> Tensor:
    torch.manual_seed(5)
    ids = torch.randint(1, 50, (2, 16))
    more = {"attention_mask": torch.ones_like(ids)} if task == "classify" else {}
    with torch.no_grad():
        out = model.eval()(input_ids=ids, **more)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A saved tokenizer of 50 words with special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 50)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# -------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_seed_decides_every_bit(name: str) -> None:
    first = make(name, task_of(name), seed=3)
    torch.manual_seed(99)
    torch.rand(7)
    again, other = make(name, task_of(name), seed=3), make(name, task_of(name), seed=4)
    assert first.training
    assert same(first, again)
    assert not same(first, other)
    assert all(p.dtype == torch.float32 for p in first.parameters())
    out = run(first, task_of(name))
    assert out.shape == ((2, 3) if task_of(name) == "classify" else (2, 16, 50))
    assert bool(out.isfinite().all())


def test_every_registered_model_is_a_shape_or_a_module() -> None:
    assert set(REGISTRY["models"]) >= SMALL
    for name, entry in REGISTRY["models"].items():
        assert entry.help
        thing = resolve("models", name)
        assert isinstance(thing, Preset) or issubclass(thing, nn.Module)


@pytest.mark.parametrize(
    ("name", "vocabulary", "seq_len", "parameters"),
    [
        ("gpt2-small", 50_257, 1024, 124_439_808),
        ("gpt2-medium", 50_257, 1024, 354_823_168),
        ("llama-1b", 128_256, 2048, 1_235_814_400),
    ],
)
def test_known_models_have_their_published_size(
    name: str, vocabulary: int, seq_len: int, parameters: int
) -> None:
    with torch.device("meta"):
        model = build(name, task="pretrain", vocab_size=vocabulary, seq_len=seq_len)
    about = describe(model, seq_len=seq_len)
    assert about.parameters == about.trainable == parameters


def test_gpt2_small_is_transformers_default_without_dropout() -> None:
    from transformers import GPT2Config

    with torch.device("meta"):
        config = build("gpt2-small", task="pretrain", vocab_size=50_257, seq_len=1024).config
    ours, theirs = config.to_dict(), GPT2Config().to_dict()  # type: ignore[operator]
    differing = {k for k in theirs if ours.get(k) != theirs[k] and not k.startswith("_")}
    dropouts = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}
    assert dropouts <= differing
    assert differing <= dropouts | {"bos_token_id", "eos_token_id", "dtype", "torch_dtype"}


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_attention_is_pytorchs_fused_one(name: str) -> None:
    assert make(name).config._attn_implementation == "sdpa"  # type: ignore[union-attr]


def test_special_tokens_that_the_files_tell_are_those_of_transformers(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read without Transformers where the files say all; anything else is left to it."""
    own = tmp_path / "own"
    tokenize.train("byte", [], own)
    odd = shutil.copytree(own, tmp_path / "odd")
    settings = json.loads((odd / "tokenizer_config.json").read_text())
    (odd / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|not there|>"}))
    (odd / "special_tokens_map.json").unlink(missing_ok=True)
    told = {at: fit._told_tokens(at) for at in (own, tokenizer_dir, odd)}
    assert told[own] is not None
    assert told[odd] is None
    assert fit.special_tokens(odd)["pad_id"] == 257  # Transformers adds it
    monkeypatch.setattr(fit, "_told_tokens", lambda directory: None)
    for at in (own, tokenizer_dir):
        assert told[at] in (None, fit.special_tokens(at))


def test_special_tokens_are_the_tokenizers(tokenizer_dir: Path) -> None:
    model: Any = make("gpt2-nano", tokenizer_dir=tokenizer_dir)
    assert (model.config.pad_token_id, model.config.eos_token_id, model.config.bos_token_id) == (0, 1, None)
    assert model.generation_config.eos_token_id == 1
    assert run(make("llama-nano", "classify", tokenizer_dir=tokenizer_dir), "classify").shape == (2, 3)
    with pytest.raises(ModelError, match=r"without a padding token.*bert-tiny"):
        make("llama-nano", "classify")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        make("gpt2-nano", tokenizer_dir=tokenizer_dir.parent)


def test_building_is_silent(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    logging.getLogger("transformers").propagate = True
    for name in sorted(SMALL):
        save_model(make(name, task_of(name)), tmp_path / name)
        load_model(tmp_path / name)
    make(str(tmp_path / "gpt2-nano"))
    assert caplog.records == []
    out, err = capfd.readouterr()
    assert out == err == ""


def test_changes_in_call_form_and_as_overrides() -> None:
    assert (
        describe(make("gpt2-nano(n_layer=3)"), seq_len=16).parameters
        > describe(make("gpt2-nano"), seq_len=16).parameters
    )
    model: Any = make("gpt2-nano(n_layer=3, resid_pdrop=0.1)", overrides={"n_layer": 1})
    assert (model.config.n_layer, model.config.resid_pdrop) == (1, 0.1)
    renamed: Any = make("gpt2-nano(num_hidden_layers=1)")  # Transformers' common name of n_layer
    assert renamed.config.n_layer == 1
    assert make("tutorial(dropout=0.1)", "classify").dropout.p == 0.1  # type: ignore[union-attr]
    assert split_call("a/b") == ("a/b", {})
    assert isinstance(parse("x(a=1)"), Call)


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("gpt2-nan", "pretrain", "did you mean 'gpt2-nano'"),
        ("gpt2-nano(n_layers=2)", "pretrain", "did you mean 'n_layer'"),
        ("gpt2-nano(3)", "pretrain", r"write gpt2-nano\(key=value\)"),
        ("tutorial(widht=3)", "classify", "did you mean 'width'"),
        ("bert-tiny", "pretrain", "sees the words that it would have to predict"),
        ("tutorial", "pretrain", "stands for AutoModelForSequenceClassification"),
        ("gpt2-nano", "translate", "'translate' is not among the tasks"),
        ("no_such_module:build", "pretrain", "there is no module 'no_such_module'"),
        ("json:dupms", "pretrain", "did you mean 'dumps'"),
        ("json:__doc__", "pretrain", "not callable"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(name: str, task: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(name, task)


def test_numbers_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(UsageError, match="n_labels = 1"):
        make("tutorial", "classify", n_labels=1)
    with pytest.raises(ModelError, match=r"8 positions, rows have 16 tokens.*--seq-len 8"):
        make("gpt2-nano(n_positions=8)")
    with pytest.raises(ModelError, match=r"gpt2-nano \(gpt2\) cannot be built: .*divisible"):
        make("gpt2-nano(n_head=3)")
    with pytest.raises(ModelError, match=r"vocabulary of 40, the tokenizer has 50.*own tokenizer"):
        make("gpt2-nano(vocab_size=40)")
    assert make("gpt2-nano(vocab_size=64)").config.vocab_size == 64  # type: ignore[union-attr]  # padded


def test_any_architecture_by_configuration(tmp_path: Path) -> None:
    shape = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "architectures": ["GPTNeoXForCausalLM"], "max_position_embeddings": 32}
    path = tmp_path / "neox.json"
    path.write_text(json.dumps(shape))
    model: Any = make(f"config:{path}")
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert model.config.vocab_size == 50
    assert run(model).shape == (2, 16, 50)
    changed: Any = make(f"config:{path}(num_hidden_layers=1)")
    assert changed.config.num_hidden_layers == 1
    path.write_text(json.dumps({**shape, "vocab_size": 5000}))
    with pytest.raises(ModelError, match=r"vocabulary of 5,000, the tokenizer has 50"):
        make(f"config:{path}")
    path.write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(ModelError, match="has no 'model_type'"):
        make(f"config:{path}")
    path.write_text(json.dumps({"model_type": "gpt_neoxx"}))
    with pytest.raises(ModelError, match="gpt_neoxx"):
        make(f"config:{path}")
    with pytest.raises(ModelError, match="names a JSON file"):
        make(f"config:{tmp_path}/none.json")


# ------------------------------------------------------------------------------------ from directories


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_what_is_saved_plain_transformers_loads_and_so_do_we(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = make(name, seed=1)
    save_model(model, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names >= {"config.json", "model.safetensors"}
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    expected = run(model)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert torch.equal(run(loaded), expected)
    again = make(str(tmp_path), seed=7)
    assert again.training
    assert torch.equal(run(again), expected)


def test_a_directory_is_checked_against_the_tokenizer(tmp_path: Path) -> None:
    save_model(make("gpt2-nano"), tmp_path)
    with pytest.raises(ModelError, match=r"vocabulary of 50, the tokenizer has 60.*model's own tokenizer"):
        make(str(tmp_path), vocab_size=60)
    with pytest.raises(ModelError, match="vocabulary of 50"):
        make(str(tmp_path), vocab_size=5, overrides={"n_positions": 16, "vocab_size": 50_257})
    with pytest.raises(ModelError, match="16 positions, rows have 17"):
        make(str(tmp_path), seq_len=17)
    with pytest.raises(ModelError, match=r"holds no config.json"):
        make(str(tmp_path.parent))
    dropped: Any = make(f"{tmp_path}(resid_pdrop=0.2)")
    assert dropped.config.resid_pdrop == 0.2


def test_half_precision_weights_are_trained_in_float32(tmp_path: Path) -> None:
    save_model(make("gpt2-nano").bfloat16(), tmp_path)
    assert {p.dtype for p in make(str(tmp_path)).parameters()} == {torch.float32}


def test_weights_are_neither_rounded_nor_said_to_be(tmp_path: Path) -> None:
    """Many models are published in half precision: what goes on in float32 is saved, and loaded, as that."""
    first = make("gpt2-nano")
    save_model(first, tmp_path / "first")
    path = tmp_path / "first" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), store.type_key(): "bfloat16"}))
    again = make(str(tmp_path / "first"))
    assert same(first, again)
    (tmp_path / "again").mkdir()
    store.write_config(again, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())[store.type_key()] == "float32"


def test_a_changed_model_of_a_directory_has_that_directorys_tokenizer(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    save_model(make("gpt2-nano"), tokenizer_dir)
    assert tokenizer_for(Job(model=str(tokenizer_dir))) == str(tokenizer_dir)
    assert tokenizer_for(Job(model=f"{tokenizer_dir}(resid_pdrop=0.2)")) == str(tokenizer_dir)
    (tokenizer_dir / "tokenizer.json").unlink()
    (tokenizer_dir / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="brings no tokenizer"):
        tokenizer_for(Job(model=f"{tokenizer_dir}(resid_pdrop=0.2)"))


def test_a_new_head_on_a_saved_body_follows_the_seed(tmp_path: Path, tokenizer_dir: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    body = BertForMaskedLM(
        BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )
    body.save_pretrained(tmp_path / "body")
    models = [
        make(str(tmp_path / "body"), "classify", seed=s, tokenizer_dir=tokenizer_dir) for s in (0, 0, 1)
    ]
    first: Any = models[0]
    assert first.config.num_labels == 3
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(first.get_parameter(word), body.get_parameter(word))
    assert draws_random(first)  # BERT's own configuration has dropout


def test_damaged_and_foreign_directories_are_named(tmp_path: Path) -> None:
    save_model(make("bert-tiny", "classify"), tmp_path / "bert")
    with pytest.raises(ModelError, match=r"lacks \d+ weights of a BertLMHeadModel"):
        make(str(tmp_path / "bert"), "pretrain", vocab_size=50, overrides={"is_decoder": True})
    save_model(make("gpt2-nano"), tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"torn cannot be loaded as GPT2LMHeadModel"):
        load_model(tmp_path / "torn")
    weights.unlink()
    torch.save({}, tmp_path / "torn" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"torn cannot be loaded.*safetensors"):
        load_model(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: .*JSON object"):
        load_model(tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text('{"architectures": ["FutureModel"]}')
    with pytest.raises(ModelError, match="FutureModel"):
        load_model(tmp_path / "torn")


# --------------------------------------------------------------------------------------- any nn.Module

TWO_TOWERS = """
import torch

class Towers(torch.nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab_size, width)
        self.head = torch.nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

def build(vocab_size, seq_len, width=8):
    assert seq_len == 16
    return Towers(vocab_size, width)

def number(vocab_size):
    return 3
"""


def test_a_function_of_the_users_makes_a_model_that_is_saved_and_remade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two_towers.py").write_text(TWO_TOWERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = make("two_towers:build(width=4)", seed=2)
    assert same(model, make("two_towers:build(width=4)", seed=2))
    save_model(model, tmp_path / "saved")
    recipe = json.loads((tmp_path / "saved" / "config.json").read_text())["manyhands"]
    assert recipe == {"model": "two_towers:build", "arguments": {"vocab_size": 50, "seq_len": 16, "width": 4}}
    with pytest.raises(ModelError, match=r"names the function 'two_towers:build'.*trusted"):
        load_model(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", trust=True)
    assert loaded.head.weight is loaded.embed.weight  # type: ignore[union-attr]
    assert torch.equal(run(loaded), run(model))
    fresh = make("two_towers:build(width=4)", seed=5)
    load_weights(fresh, tmp_path / "saved")
    assert same(fresh, model)
    with pytest.raises(ModelError, match="its tensors fit the model"):
        load_weights(make("two_towers:build(width=5)"), tmp_path / "saved")
    with pytest.raises(ModelError, match="returned a int"):
        make("two_towers:number")
    with pytest.raises(UsageError, match="did you mean 'width'"):
        make("two_towers:build(widht=4)")


def test_the_tutorial_classifier_is_remade_without_trust(tmp_path: Path) -> None:
    model = make("tutorial(width=12)", "classify")
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)
    assert same(make(str(tmp_path), "classify"), model)
    sizes: dict[str, int] = {"vocab_size": 50, "seq_len": 16, "n_labels": 2}
    two = build("tutorial(width=12)", task="classify", **sizes)
    save_model(two, tmp_path / "two")
    assert same(build(str(tmp_path / "two"), task="classify", **sizes), two)
    for name, value, words in (
        ("vocab_size", 51, "made for 50 tokens"),
        ("n_labels", 3, "made for 2 classes"),
    ):
        with pytest.raises(ModelError, match=words):
            build(str(tmp_path / "two"), task="classify", **{**sizes, name: value})
    with pytest.raises(UsageError, match="loaded as it was made"):
        make(f"{tmp_path}(width=3)", "classify")


def test_a_module_made_elsewhere_keeps_its_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))
    save_model(model, tmp_path)
    with pytest.raises(ModelError, match="into=model"):
        load_model(tmp_path)
    other = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 50))
    load_weights(other, tmp_path)
    assert same(model, other)


def test_arguments_that_json_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("tutorial", "classify")
    model.__dict__["manyhands_recipe"]["arguments"]["odd"] = object()
    with pytest.raises(ModelError, match="arguments of tutorial cannot be written"):
        save_model(model, tmp_path)


# ----------------------------------------------------------------------------------------- description


def test_flops_and_sizes_by_hand() -> None:
    model = make("gpt2-micro", vocab_size=65, seq_len=64)
    about = describe(model, seq_len=64)
    width, layers = 128, 4
    block = 12 * width**2 + 13 * width  # matrices, biases and norms of one layer
    assert about.non_embedding == layers * block + 2 * width
    assert about.parameters == about.non_embedding + (65 + 64) * width
    multiplied = about.non_embedding + 65 * width  # the tied head is multiplied with, positions are looked up
    assert about.flops_per_token == 6 * multiplied + 12 * layers * width * 64
    untied = describe(make("llama-nano(tie_word_embeddings=false)"), seq_len=16)
    tied = describe(make("llama-nano"), seq_len=16)
    assert untied.parameters == tied.parameters + 50 * 64
    assert untied.flops_per_token == tied.flops_per_token
    assert describe(nn.Linear(3, 2), seq_len=9).flops_per_token == 6 * 8


@pytest.mark.parametrize("name", sorted(SMALL - {"tutorial"}))
def test_presets_draw_nothing(name: str) -> None:
    assert not draws_random(make(name, task_of(name)))


def test_dropout_is_noticed() -> None:
    assert draws_random(make("gpt2-nano(resid_pdrop=0.1)"))
    assert draws_random(make("llama-nano(attention_dropout=0.1)"))
    plain: Any = make("gpt2-nano")
    plain.config.summary_first_dropout = 0.1  # as every GPT-2 says, of a head that is not there
    assert not draws_random(plain)
    assert draws_random(make("tutorial", "classify"))
    assert not draws_random(make("tutorial(dropout=0)", "classify"))
    assert draws_random(nn.LSTM(3, 3, num_layers=2, dropout=0.2))
    assert draws_random(nn.MultiheadAttention(4, 2, dropout=0.2))
    assert not draws_random(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)))
    said = nn.Linear(2, 2)
    said.draws_random = True  # type: ignore[assignment]
    assert draws_random(said)


def test_values_need_no_torch() -> None:
    """The launcher and the command line read specs and registries before torch is imported."""
    code = (
        "import sys, manyhands.strategy.optimizers, manyhands.strategy.schedules, manyhands.models.build;"
        "import manyhands.tasks.pretrain, manyhands.tasks.classify, manyhands.data.sample;"
        "from manyhands.core.config import from_text; from_text('optimizers', 'muon(1e-3)');"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "other", "field"),
    [
        ("gpt2-nano", "gpt2-nano(n_head=4)", "n_head"),
        ("gpt2-nano", "gpt2-nano(activation_function='relu')", "activation_function"),
        ("llama-nano", "llama-nano(rms_norm_eps=0.1)", "rms_norm_eps"),
        ("gpt2-nano", "gpt2-nano(resid_pdrop=0.3, initializer_range=0.3)", None),
        ("llama-nano", "gpt2-nano", "model_type"),
        ("tutorial", "tutorial(hidden=8)", "hidden"),
        ("tutorial", "tutorial(dropout=0.3)", None),
        ("tutorial", "tutorial(hidden=256)", None),
    ],
)
def test_a_configuration_tells_another_function(
    name: str, other: str, field: str | None, tmp_path: Path
) -> None:
    task = "classify" if name == "tutorial" else "pretrain"
    made = make(name, task=task)
    save_model(made, tmp_path)
    assert difference(made, tmp_path) is None
    found = difference(make(other, task=task), tmp_path)
    assert (found.name if found else None) == field
