"""Every config here is valid; every mistake is one line that names its field, before anything is written."""

import importlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from experiments import train
from experiments.flags import load_config, without_folder
from research.config import ConfigError, num_steps, validate

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
ROOT = Path(__file__).parent.parent
STRATEGIES = ("balanced", "long_seq", "large_batch")


def config_of(strategy: str, scale: str = "cpu"):
    return importlib.import_module(f"configs.{strategy}").get_config(scale)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("scale", "platform"), [("cpu", "cpu"), ("published", "gpu")])
def test_every_strategy_is_valid(strategy, scale, platform):
    config = load_config(f"{ROOT / 'configs' / strategy}.py:{scale}")
    validate(config, (1, 1, 1), platform)
    assert (config.strategy, config.scale) == (strategy, scale)
    assert config.is_locked


def test_strategies_differ_in_shape_alone_and_see_equally_many_tokens():
    configs = [config_of(strategy) for strategy in STRATEGIES]
    assert len({c.batch_size * c.seq_len for c in configs}) == 1
    assert len({num_steps(c) * c.batch_size * c.seq_len for c in configs}) == 1
    plain = []
    for config in configs:
        content = config.to_dict()
        for name in ("strategy", "batch_size", "seq_len"):
            content.pop(name)
        plain.append(content)
    assert plain[0] == plain[1] == plain[2]


def test_published_shapes():
    shapes = {s: (c.batch_size, c.seq_len) for s in STRATEGIES for c in [config_of(s, "published")]}
    assert shapes == dict(balanced=(26, 1024), long_seq=(6, 4096), large_batch=(104, 256))


def test_tokens_are_whole_steps_rounded_up():
    config = config_of("balanced")
    config.train.tokens = 3 * 16 * 512 + 1
    assert num_steps(config) == 4


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder of 20 documents of 400 bytes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"Document {i:02d}. " * 28 + "12345678")
    return folder


SMALL = {
    "model.num_layers": 1, "model.d_model": 16, "model.num_heads": 2, "model.d_ff": 16, "model.num_experts": 2,
    "model.vocab_size": 257, "seq_len": 32, "batch_size": 8, "train.steps": 2, "mesh.data": 1,
    "data.source": "text", "data.path": "TEXT", "data.tokenizer": "bytes", "data.cache_dir": "CACHE",
    "eval.contexts": (8,), "eval.num_targets": 16, "eval.own_targets": 32,
}  # fmt: skip


def refusal(tmp_path: Path, capsys, workdir: str = "run", config: str = "balanced.py:cpu", **fields) -> str:
    """The one line of `python -m experiments.train` with a mistake in it; nothing is written."""
    before = sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts)
    places = dict(TEXT=str(tmp_path / "text"), CACHE=str(tmp_path / "cache"))
    overrides = SMALL | {name.replace("__", "."): value for name, value in fields.items()}
    arguments = [f"--config.{name}={places.get(value, value)}" for name, value in overrides.items()]
    code = train.main([f"--config={ROOT / 'configs' / config}", f"--workdir={tmp_path / workdir}", *arguments])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert not out and err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(p for p in tmp_path.rglob("*") if "cache" not in p.parts) == before
    return err.removeprefix("error: ").strip()


MISTAKES = [
    ("config.model.depth=", dict(model__depth=3)),
    ("config.model.num_layers='many'", dict(model__num_layers="many")),
    ("config.model", dict(model=3)),
    ("config.batch_size=6", dict(batch_size=6, mesh__data=4)),
    ("config.batch_size=8", dict(train__accumulation=3)),
    ("config.batch_size=12", dict(batch_size=12, mesh__data=2, train__accumulation=4)),
    ("config.seq_len=99999999999", dict(seq_len=99999999999, batch_size=1)),
    ("config.seq_len=2048", dict(seq_len=2048, batch_size=2**20)),
    ("config.seq_len=34", dict(seq_len=34, mesh__seq=4)),
    ("config.model.d_model=18", dict(model__d_model=18, model__num_heads=4)),
    ("config.model.num_heads=4", dict(model__d_model=12, model__num_heads=4)),
    ("config.model.d_model=20", dict(model__d_model=20, mesh__data=8, mesh__fsdp=True)),
    ("config.model.experts_per_token=3", dict(model__experts_per_token=3)),
    ("config.model.num_experts=0", dict(model__num_experts=0)),
    ("config.model.dropout=1.0", dict(model__dropout=1.0)),
    ("config.optimizer.learning_rate=0.0", dict(optimizer__learning_rate=0.0)),
    ("config.optimizer.learning_rate=inf", dict(optimizer__learning_rate="inf")),
    ("config.model.balance_weight=1e+39", dict(model__balance_weight=1e39)),
    ("config.optimizer.decay_fraction=0.6", dict(optimizer__schedule="wsd", optimizer__warmup_fraction=0.5,
                                                optimizer__decay_fraction=0.6)),
    ("config.optimizer.name='sgd'", dict(optimizer__name="sgd")),
    ("config.train.steps=2", dict(train__tokens=512)),
    ("config.train.steps=0", dict(train__steps=0)),
    ("config.data.path=", dict(data__path="/no/such/folder")),
    ("config.data.source='books'", dict(data__source="books")),
    ("config.batch_size=800", dict(batch_size=800)),
    ("config.data.max_epochs=1", dict(train__steps=200)),
    ("config.eval.contexts=(8, 400)", dict(eval__contexts=(8, 400), eval__num_targets=100)),
    ("config.eval.contexts=(10,)", dict(eval__contexts=(10,))),
    ("config.eval.contexts=('a',)", dict(eval__contexts="('a',)")),
    (f"config.seed={2**63}", dict(seed=2**63)),
    ("config.seed=-1", dict(seed=-1)),
    ("config.optimizer.name='adam'", dict(optimizer__name="adam", batch_size=-1, memory_budget="1GiB")),
    ("config.eval.num_targets=", dict(eval__num_targets=100_000)),
    ("config.seq_len=4096", dict(seq_len=4096, batch_size=1, data__max_epochs=0)),
    ("config.model.vocab_size=100", dict(model__vocab_size=100)),
    ("config.mesh.data=99", dict(mesh__data=99)),
    ("config.mesh.seq=16", dict(mesh__seq=16)),
    ("config.mesh.expert=2", dict(mesh__expert=2)),
    ("config.data.shuffle_block=48", dict(data__shuffle_block=48)),
    ("config.data.shuffle_block=64", dict(data__shuffle_block=64, data__protocol="published")),
    ("config.data.tokenizer=", dict(data__tokenizer="no/such/tokenizer.json")),
    ("config.model.attention='cudnn'", dict(model__attention="cudnn", data__mask_documents=True)),
]  # fmt: skip


@pytest.mark.parametrize(("named", "fields"), MISTAKES, ids=[named for named, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_its_field(tmp_path, text, capsys, named, fields):
    assert refusal(tmp_path, capsys, **fields).startswith(named)


@pytest.mark.parametrize("content", [b"", b"plain text, then \xff\xfe"])
def test_a_file_that_is_empty_or_not_utf8_is_named(tmp_path, capsys, content):
    (tmp_path / "text").write_bytes(content)
    message = refusal(tmp_path, capsys)
    assert message.startswith("config.data.path=")
    assert not content or "byte 17 is not UTF-8" in message


def test_an_empty_folder_is_named(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    assert refusal(tmp_path, capsys).startswith("config.data.path=")


def test_one_document_leaves_nothing_to_hold_out(tmp_path, capsys):
    (tmp_path / "text").write_text("One document. " * 100)
    assert refusal(tmp_path, capsys).startswith("config.data.heldout_fraction=")


def test_a_workdir_that_cannot_be_written_is_named(tmp_path, text, capsys):
    (tmp_path / "run").write_text("a file where the folder should be")
    assert refusal(tmp_path, capsys).startswith("--workdir=")


@pytest.mark.parametrize(
    "argument",
    [
        "--config=nowhere.py:cpu",
        "--config=configs/balanced.py:huge",
        "--config=configs/balanced.py:",
        "--config=README.md",
        "--steps=3",
        "--workdir=",
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, capsys, monkeypatch, argument):
    monkeypatch.chdir(ROOT)
    given = [f"--workdir={tmp_path / 'run'}", "--config=configs/balanced.py:cpu", argument]
    assert train.main(given) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture
def no_hub(monkeypatch):
    """As on a machine without a network: asking the hub fails."""

    def fail(*_, **__):
        raise ConnectionError("Max retries exceeded\nName or service not known")

    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # for the process that reads data sets


def test_a_hub_that_is_out_of_reach_is_said_in_one_line(no_hub, tmp_path, text, capsys):
    message = refusal(tmp_path, capsys, data__source="hf", data__path="owner/books")
    assert message.startswith("config.data.path='owner/books'") and "Hugging Face" in message
    message = refusal(tmp_path, capsys, data__tokenizer="owner/tokens")
    assert message.startswith("config.data.tokenizer='owner/tokens'") and "Hugging Face" in message


def mistake(config, platform: str = "gpu") -> ConfigError:
    with pytest.raises(ConfigError) as error:
        validate(config, (1, 1, 1), platform)
    return error.value


def test_neither_steps_nor_tokens():
    config = config_of("balanced")
    config.train.tokens = None
    assert mistake(config).field == "config.train.steps"


@pytest.mark.parametrize(
    ("group", "field", "value", "said"),
    [("data", "mask_documents", True, "mask_documents"), ("model", "dropout", 0.1, "dropout"),
     ("model", "dtype", "float32", "bfloat16"), ("model", "num_heads", 32, "head widths")],
)  # fmt: skip
def test_what_cudnn_cannot_do_is_refused(group, field, value, said):
    config = config_of("balanced")
    config.model.attention, config.model.dtype = "cudnn", "bfloat16"
    validate(config, (1, 1, 1), "gpu")
    config[group][field] = value
    error = mistake(config)
    assert error.field == "config.model.attention" and said in str(error)


def test_kernels_of_a_gpu_are_refused_elsewhere():
    config = config_of("balanced")
    config.model.attention, config.model.dtype, config.model.dropout = "flash", "bfloat16", 0.1
    validate(config, (1, 1, 2), "gpu")
    for platform in ("cpu", "tpu"):
        with pytest.raises(ConfigError, match=platform):
            validate(config, (1, 1, 1), platform)


def test_a_command_is_kept_without_its_folder():
    given = ["--a=1", "--workdir=x", "--workdir", "y", "--b"]
    assert without_folder(given) == ["--a=1", "--b"] and without_folder(["--workdir"]) == []
