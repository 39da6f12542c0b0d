"""Data sets and tokenizers by name, through the Hub's own clients: real processes, a server on this machine."""

import io
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from configs import base
from research.data.tokenizer import EOT
from research.data.tokens import open_corpus
from tests.hub.server import Files, Hub, commit, serve

ROOT = Path(__file__).parents[2]
FIRST_FILE, VOCABULARY = 300, 300  # rows: more than are encoded at once; tokens
LAST_FILE = "first/train-00001-of-00002.parquet"
CARD = """---
configs:
- config_name: first
  data_files: [{split: train, path: first/train-*}]
- config_name: second
  data_files: [{split: train, path: second/train-*}]
---
"""
TINY = [
    "model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.d_ff=32", "model.num_experts=2",
    f"model.vocab_size={VOCABULARY}", "model.loss_chunk=64", "model.moe_block=32", "model.attention_chunk=32",
    "seq_len=64", "batch_size=8", "train.steps=2", "train.eval_every=0", "mesh.data=1",
    "eval.contexts=(8,)", "eval.num_targets=64", "eval.own_targets=128", "eval.batch_tokens=128",
    "data.source=hf", "data.tokenizer=lab/tokens",
]  # fmt: skip
# Read by each Python that starts: the clients wait seconds before each retry, ten minutes where all fail.
HURRIED = """import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))"""


@dataclass(frozen=True)
class Books:
    """Rows by config, the same in `lab/books`, and the tokenizer of `lab/tokens`."""

    rows: dict[str, list[str]]
    repositories: dict[str, Files]
    tokenizer: Tokenizer

    def named(self, config: str) -> list[list[str]]:
        """[id, text] of the config's documents: rows are numbered from 0, an empty one is none."""
        return [[f"lab/books/{config}:{i}", text] for i, text in enumerate(self.rows[config]) if text]


@pytest.fixture(scope="module")
def books() -> Books:
    rows = {config: made_up(config) for config in ("first", "second")}
    files = {"README.md": CARD.encode()}
    for config, texts in rows.items():
        for i, part in enumerate((texts[:FIRST_FILE], texts[FIRST_FILE:])):
            files[f"{config}/train-0000{i}-of-00002.parquet"] = table(part)
    tokenizer = trained_on(rows["first"])
    tokens = {"tokenizer.json": tokenizer.to_str().encode()}
    before = files | {"first/train-00000-of-00002.parquet": table(["of before"])}
    tokens_before = {"tokenizer.json": trained_on(rows["second"]).to_str().encode()}
    repositories = {"datasets/lab/books": files, "models/lab/tokens": tokens}
    repositories |= {"datasets/lab/books@v1": before, "models/lab/tokens@v1": tokens_before}
    return Books(rows, repositories, tokenizer)


def made_up(name: str) -> list[str]:
    """400 texts, no two the same but for the empty ones; a file of them is more than a pipe holds."""
    rng = random.Random(name)
    words = ["a", "quick", "brown", "fox", "jumps", "over", "the", "straße", "日本", "\n", EOT]
    texts = [f"{name} {i} {' '.join(rng.choices(words, k=rng.randint(20, 300)))}" for i in range(400)]
    return ["" if i in (5, 333) else text for i, text in enumerate(texts)]


def table(texts: list[str]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"number": range(len(texts)), "text": texts}), file, row_group_size=90)
    return file.getvalue()


def trained_on(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture
def hub(books):
    with serve(books.repositories) as hub:
        yield hub


def child(hub: Hub, home: Path, module: str, *arguments: str, hurried: bool = False) -> subprocess.CompletedProcess:
    """Runs a module with `home` for its files and `hub` for the Hub; all else that it asks the net is refused."""
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= dict(HOME=str(home), HF_HOME=str(home / "huggingface"), HF_ENDPOINT=hub.endpoint)
    environment |= dict(HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
    environment |= dict(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_backend_optimization_level=0")
    if hurried:
        (home / "hurried").mkdir(exist_ok=True)
        (home / "hurried" / "sitecustomize.py").write_text(HURRIED)
        environment["PYTHONPATH"] = str(home / "hurried")
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def read(hub: Hub, home: Path, *fields: dict, hurried: bool = False) -> list:
    """What each of `config.data` fields leads to; nothing else is said, but by clients that are `hurried` to retry."""
    done = child(hub, home, "tests.hub.read", json.dumps(fields), hurried=hurried)
    assert done.returncode == 0 and (hurried or not done.stderr), done.stderr
    return json.loads(done.stdout)


def train(hub: Hub, home: Path, *more: str, hurried: bool = False) -> subprocess.CompletedProcess:
    """Trains in `home`/run with the token cache `home`/cache."""
    overrides = [f"--config.{override}" for override in (*TINY, f"data.cache_dir={home / 'cache'}", *more)]
    arguments = ["--config=configs/balanced.py:cpu", f"--workdir={home / 'run'}", *overrides]
    return child(hub, home, "experiments.train", *arguments, hurried=hurried)


def refusal(done: subprocess.CompletedProcess, home: Path) -> str:
    """The one line of a run that was refused, and left nothing."""
    assert done.returncode == 2 and not done.stdout, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(f"{line}\n") and "Traceback" not in done.stderr
    assert not (home / "run").exists() and not list((home / "cache").rglob("*"))
    return line


# What is read


def test_documents_are_the_rows_of_the_named_config_in_order(books, hub, tmp_path):
    whole, limited = read(hub, tmp_path, {"path": "lab/books/first"}, {"path": "lab/books/second", "max_documents": 7})
    assert whole == books.named("first") and len(whole) == 398
    assert limited == books.named("second")[:7]  # row 5 is empty
    read_to_the_end = {config for config in books.rows if any(f"/{config}/train-00001" in path for path in hub.asked)}
    assert read_to_the_end == {"first"}  # a limit stops the downloads too


def test_what_is_not_there_is_named(hub, tmp_path):
    wrong = [{"path": "lab/books"}, {"path": "lab/books/third"}, {"path": "lab/books/first", "text_field": "body"}]
    which, third, body, tokens = read(hub, tmp_path, *wrong, {"tokenizer": "lab/none"})
    assert which.startswith("config.data.path='lab/books': not readable") and "['first', 'second']" in which
    assert third.startswith("config.data.path='lab/books/third': not readable") and "['first', 'second']" in third
    assert body == "config.data.text_field='body': row 0 has no such text; it has number, text"
    assert tokens.startswith("config.data.tokenizer='lab/none': not readable") and "Repository Not Found" in tokens


def test_a_tokenizer_is_downloaded_once_and_whole(books, hub, tmp_path):
    ask = {"tokenizer": "lab/tokens"}
    hub.broken["tokenizer.json"] = "cut"
    (cut,) = read(hub, tmp_path, ask, hurried=True)
    assert cut.startswith("config.data.tokenizer='lab/tokens': not readable") and "closed connection" in cut
    hub.broken.clear()
    (whole,) = read(hub, tmp_path, ask)
    assert json.loads(whole)["model"] == json.loads(books.tokenizer.to_str())["model"]
    hub.asked.clear()
    assert read(hub, tmp_path, ask) == [whole] and not hub.asked


def test_a_revision_can_be_pinned_by_a_tag_or_a_commit(books, hub, tmp_path):
    before = books.repositories["models/lab/tokens@v1"]
    names = ["lab/tokens@v1", f"lab/tokens@{commit(before)}", "lab/tokens", "lab/tokens@v2"]
    documents = [{"path": f"lab/books/first@{name}", "max_documents": 1} for name in ("v1", "v2")]
    tag, pinned, newest, wrong, first, none = read(hub, tmp_path, *({"tokenizer": name} for name in names), *documents)
    assert tag == pinned != newest
    assert json.loads(tag)["model"] == json.loads(before["tokenizer.json"])["model"]
    assert first == [["lab/books/first:0", "of before"]]  # its id is that of the newest
    assert wrong.startswith("config.data.tokenizer='lab/tokens@v2': not readable") and "Revision Not Found" in wrong
    assert none.startswith("config.data.path='lab/books/first@v2': not readable") and "Revision Not Found" in none


# What is trained on


@pytest.fixture(scope="module")
def home(books, tmp_path_factory) -> Path:
    """The folder of a run that is over."""
    home = tmp_path_factory.mktemp("trained")
    with serve(books.repositories) as hub:
        done = train(hub, home, "data.path=lab/books/first")
    assert done.returncode == 0, done.stderr
    return home


def test_a_run_names_its_source_and_is_found_again_without_the_hub(books, home, hub):
    manifest = json.loads((home / "run" / "data_manifest.json").read_text())
    assert (manifest["source"], manifest["path"]) == ("hf", "lab/books/first")
    assert manifest["tokenizer"]["name"] == "lab/tokens"
    commits = [commit(books.repositories[name]) for name in ("datasets/lab/books", "models/lab/tokens")]
    assert [manifest["commit"], manifest["tokenizer"]["commit"]] == commits
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 398
    again = train(hub, home, "data.path=lab/books/first")
    assert again.returncode == 0 and "finished before, at step 2" in again.stderr
    assert not hub.asked


def test_cached_tokens_are_those_of_the_same_rows_in_a_local_file(books, home, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(table(books.rows["first"]))
    books.tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = base.get_config("cpu")
    config.model.vocab_size = VOCABULARY
    config.data.update(source="parquet", path=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    open_corpus(config)
    by_name, local = cached_documents(home / "cache"), cached_documents(tmp_path / "cache")
    assert sorted(sum(by_name.values(), [])) == sorted(sum(local.values(), []))  # ids differ, and with them the split
    number = {text: i for i, text in enumerate(books.rows["first"])}
    for documents in by_name.values():
        numbers = [number[books.tokenizer.decode(ids[:-1], skip_special_tokens=False)] for ids in documents]
        assert len(numbers) > 20 and numbers == sorted(numbers)


def cached_documents(cache: Path) -> dict[str, list[list[int]]]:
    """Ids of each document, end-of-text included, by split."""
    (manifest,) = cache.glob("*/manifest.json")

    def array(name: str) -> np.ndarray:
        return np.load(manifest.parent / f"{name}.npy")

    return {
        split: [ids.tolist() for ids in np.split(array(split), array(f"{split}_starts")[1:])]
        for split in ("train", "heldout")
    }


# What is refused


def test_a_data_set_that_is_not_there_is_one_line_and_nothing_written(hub, tmp_path):
    done = train(hub, tmp_path, "data.path=lab/none")
    line = refusal(done, tmp_path)
    assert done.stderr == f"{line}\n"
    assert line.startswith("error: config.data.path='lab/none': not readable from the Hugging Face hub")
    assert "Repository Not Found" in line and " ...); " in line  # the client's paragraph ends after a word


@pytest.mark.parametrize(("how", "reason"), [("error", "500 Internal Server Error"), ("cut", "Server Disconnected")])
def test_a_server_that_dies_half_way_leaves_nothing(hub, tmp_path, how, reason):
    hub.broken[LAST_FILE] = how
    line = refusal(train(hub, tmp_path, "data.path=lab/books/first", hurried=True), tmp_path)
    assert line.startswith("error: config.data.path='lab/books/first': not readable from the Hugging Face hub")
    assert reason in line
    assert sum(LAST_FILE in path for path in hub.asked) > 1  # after a file whose documents were encoded by then
