"""Documents come in a fixed order, within limits; a bad input is named by file and place."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from configs import base
from research.config import ConfigError
from research.data import hub
from research.data.corpora import documents, source_files


def data_config(source: str, path: Path | str = "", **fields):
    data = base.get_config("cpu").data
    data.update(source=source, path=str(path), **fields)
    return data


def read(source: str, path: Path | str = "", **fields) -> dict[str, str]:
    return {d.id: d.text for d in documents(data_config(source, path, **fields))}


def refuse(source: str, path: Path | str = "", **fields) -> str:
    with pytest.raises(ConfigError) as error:
        read(source, path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stdlib_is_the_library_without_tests_and_packages():
    names = [name for name, _ in source_files(data_config("stdlib"))]
    assert names == sorted(names) and "json/decoder.py" in names and len(names) > 300
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not [name for name in names if name.startswith("_sysconfigdata")]
    read_back = Path(sysconfig.get_path("stdlib"), "json/decoder.py").read_bytes().decode()
    assert read("stdlib")["json/decoder.py"] == read_back
    assert "takes no path" in refuse("stdlib", "/somewhere")


def test_text_folder_is_sorted_by_relative_path_without_hidden_and_empty_files(tmp_path):
    for name in ("b/a.md", "a.txt", "b.py", ".git/c.md", ".d.txt", "e.csv", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name == "empty.txt" else f"{name} \r\n é".encode())
    found = read("text", tmp_path)
    assert list(found) == ["a.txt", "b.py", "b/a.md"]
    assert found["b/a.md"] == "b/a.md \r\n é"  # bytes are kept, line ends too
    assert read("text", tmp_path / "a.txt") == {"a.txt": "a.txt \r\n é"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_ids_are_file_and_line(tmp_path, suffix):
    text = "\n".join([json.dumps({"text": "one", "body": "1"}), "", json.dumps({"text": "zwei ü"})])
    raw = text.encode()
    (tmp_path / f"x{suffix}").write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert read("jsonl", tmp_path) == {f"x{suffix}:1": "one", f"x{suffix}:3": "zwei ü"}
    assert read("jsonl", tmp_path / f"x{suffix}", text_field="body", max_documents=1) == {f"x{suffix}:1": "1"}


def test_parquet_ids_are_file_and_row(tmp_path):
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)], "other": range(3000)})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = read("parquet", tmp_path)
    assert len(found) == 3000 and found["t.parquet:2500"] == "row 2499"
    assert refuse("parquet", tmp_path, text_field="body").startswith("config.data.text_field='body'")
    assert "row 1 holds int" in refuse("parquet", tmp_path, text_field="other")


def test_limits_hold_for_every_source(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": f"{i}éabc"}) for i in range(9)))
    parquet.write_table(pyarrow.table({"text": [f"{i}éabc" for i in range(9)]}), tmp_path / "x.parquet")
    for i in range(9):
        (tmp_path / f"{i}.txt").write_bytes(f"{i}éabc".encode())
    for source in ("text", "jsonl", "parquet"):
        found = read(source, tmp_path, max_documents=2, max_document_chars=3)
        assert list(found.values()) == ["0éa", "1éa"], source
    assert [len(text) for text in read("stdlib", max_documents=3, max_document_chars=7).values()] == [7] * 3
    assert refuse("text", tmp_path, max_documents=-1).startswith("config.data.max_documents=-1")


DAMAGED = bytearray(gzip.compress(b'{"text":"b"}' * 99))
DAMAGED[10] ^= 255  # of the compressed bytes

BAD_FILES = {
    "not UTF-8": ("text", "a.txt", "é abc".encode() + b"\xff", ["a.txt", "byte 6 "]),
    "not UTF-8, line 2": ("jsonl", "a.jsonl", b'{"text":"b"}\n\xe9', ["a.jsonl", "byte 13 "]),
    "not JSON": ("jsonl", "a.jsonl", b'{"text":"b"}\n{"text"', ["a.jsonl line 2", "JSON"]),
    "no text": (
        "jsonl",
        "a.jsonl",
        b'{"text":"b"}\n{"body":"c"}',
        ["config.data.text_field", "line 2"],
    ),
    "text is null": ("jsonl", "a.jsonl", b'{"text":null}', ["config.data.text_field", "line 1 holds null, not text"]),
    "text is a list": ("jsonl", "a.jsonl", b'{"text":["a"]}', ["config.data.text_field", "line 1 holds list"]),
    "too deep": ("jsonl", "a.jsonl", b'{"text":' + b"[" * 100_000, ["a.jsonl line 1 is not JSON"]),
    "damaged gzip": ("jsonl", "a.jsonl.gz", DAMAGED, ["a.jsonl.gz cannot be read", "while decompressing"]),
    "a column's name of two lines": ("jsonl", "a.jsonl", b'{"a\\nb":1}', ["line 1 has no such text; it has a\\nb"]),
    "many columns": (
        "jsonl",
        "a.jsonl",
        json.dumps({f"c{i}": i for i in range(500)}).encode(),
        ["it has c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 and 490 more"],
    ),
    "a file's name of two lines": ("text", "a\nb.txt", b"\xff", ["a\\nb.txt: byte 0"]),
    "no object": ("jsonl", "a.jsonl", b"[1]", ["config.data.text_field", "line 1"]),
    "half a pair": ("jsonl", "a.jsonl", b'{"text":"a\\ud800"}', ["a.jsonl:1", "character 1 "]),
    "long number": ("jsonl", "a.jsonl", b'{"text":"b","n":' + b"1" * 5000 + b"}", ["a.jsonl line 1 is not JSON"]),
    "cut gzip": ("jsonl", "a.jsonl.gz", gzip.compress(b'{"text":"b"}' * 99)[:-9], ["a.jsonl.gz"]),
    "not gzip": ("jsonl", "a.jsonl.gz", b'{"text":"b"}', ["a.jsonl.gz"]),
    "not Parquet": ("parquet", "a.parquet", b"abc" * 99, ["a.parquet is not Parquet"]),
    "all empty": ("text", "a.txt", b"", ["every document"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named(tmp_path, name):
    source, file, content, expected = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    message = refuse(source, tmp_path)
    for part in expected:
        assert part in message


def test_a_null_or_text_that_is_not_utf8_in_a_parquet_file_is_named_by_its_row(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "t.parquet")
    assert "t.parquet row 2 holds null, not text" in refuse("parquet", tmp_path)
    raw = pyarrow.array([b"a", b"bc\xff"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "t.parquet")
    assert "t.parquet row 2: byte 2 of the text is not UTF-8" in refuse("parquet", tmp_path)
    parquet.write_table(pyarrow.table({f"c{i}": [i] for i in range(12)}), tmp_path / "t.parquet")
    assert refuse("parquet", tmp_path).endswith("c8, c9 and 2 more")


def test_an_error_of_many_lines_becomes_one(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("Couldn't deserialize thrift:\n  No more data")

    (tmp_path / "t.parquet").touch()
    monkeypatch.setattr(parquet, "ParquetFile", fail)
    assert "t.parquet cannot be read: Couldn't deserialize thrift: No more data" in refuse("parquet", tmp_path)


def test_bad_path_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "it is neither a file nor a folder" in refuse("text", tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    assert refuse("text", tmp_path / "x").startswith(f"config.data.path='{tmp_path}/x': no such file")
    assert "no such file" in refuse("jsonl", "")
    assert "no .jsonl, .jsonl.gz files" in refuse("jsonl", tmp_path)
    assert refuse("csv", tmp_path).startswith("config.data.source='csv': choose one of")


@pytest.fixture
def fake_datasets(tmp_path, monkeypatch):
    """Puts code in the place of the package `datasets`, on a machine whose hub answers nothing."""

    def put(code: str) -> None:
        (tmp_path / "datasets.py").write_text(textwrap.dedent(code))

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    return put


ROWS = """
    from huggingface_hub import HfApi
    from types import SimpleNamespace
    HfApi.dataset_info = lambda *_, **__: SimpleNamespace(sha="c0ffee")

    def load_dataset(repository, *, name, revision, split, streaming):
        assert (repository, name, revision, split, streaming) == ("own/set", {name}, "c0ffee", "train", True)
        print("no row of the data set")
        yield from [dict(text="a", id=1), dict(text="b", id=2)]
"""


def test_hub_source(fake_datasets):
    fake_datasets(ROWS.format(name="'conf'"))
    assert read("hf", "own/set/conf") == {"own/set/conf:0": "a", "own/set/conf:1": "b"}
    fake_datasets(ROWS.format(name=None))
    assert read("hf", "own/set", max_documents=1) == {"own/set:0": "a"}
    assert "row 0 holds int, not text" in refuse("hf", "own/set", text_field="id")
    assert refuse("hf", "own/set", text_field="body").endswith("row 0 has no such text; it has text, id")
    fake_datasets(ROWS.format(name=None).replace('"b"', "None"))
    assert "row 1 holds null, not text" in refuse("hf", "own/set")
    assert "owner/name" in refuse("hf", "set")


MOVES = """
    from types import SimpleNamespace
    from huggingface_hub import HfApi
    HfApi.dataset_info = lambda *_, revision, **__: SimpleNamespace(sha=revision or "{newest}")

    def load_dataset(repository, *, revision, **_):
        yield dict(text=repository + " at " + revision)
"""


def test_a_process_reads_one_commit_of_a_data_set_and_the_one_that_is_pinned(fake_datasets, monkeypatch):
    monkeypatch.setattr(hub, "COMMITS", {})
    fake_datasets(MOVES.format(newest="one"))
    assert read("hf", "own/set") == {"own/set:0": "own/set at one"}
    fake_datasets(MOVES.format(newest="two"))
    assert read("hf", "own/set") == {"own/set:0": "own/set at one"}  # a tokenizer was trained on it, say
    assert read("hf", "own/set/conf@a/b") == {"own/set/conf:0": "own/set at a/b"}
    assert hub.COMMITS == {"datasets/own/set": "one", "datasets/own/set/conf@a/b": "a/b"}
    assert "no revision follows its @" in refuse("hf", "own/set@")
    hub.COMMITS.clear()
    assert read("hf", "own/set") == {"own/set:0": "own/set at two"}


def test_hub_without_its_package(fake_datasets):
    fake_datasets("raise ImportError('No module named datasets')")  # as where it is not installed
    assert "pip install datasets" in refuse("hf", "own/set")


@pytest.mark.parametrize("last", [b"", b'{"text": "a', b'{"text": "a"}\n{"te'])
def test_a_reader_of_the_hub_that_dies_is_said(fake_datasets, last):
    fake_datasets(f"import os; os.write(1, {last!r}); os._exit(7)")
    assert "its reader ended with exit code 7" in refuse("hf", "own/set")


def test_a_reader_of_the_hub_ends_with_who_asked(fake_datasets):
    fake_datasets("import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(600)")
    code = "from research.data import hub; next(hub.rows('own/set', 'text'))"
    root = Path(__file__).parents[1]
    asks = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.PIPE, text=True)
    assert asks.stderr.readline() == "begun\n"
    asks.kill()
    asks.communicate(timeout=30)  # the end of stderr, which the reader has too


def test_hub_out_of_reach_is_said_at_once_without_the_retries_of_datasets(fake_datasets):
    fake_datasets("def load_dataset(*_, **__): raise AssertionError('datasets would retry for minutes')")
    message = refuse("hf", "own/set")
    assert "not readable from the Hugging Face hub" in message and "AssertionError" not in message


def test_folders_behind_links_are_read_once_and_names_in_capitals_too(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "books" / "A.TXT").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    for name in ("more", "again"):
        (tmp_path / "books" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "books")
    assert read("text", tmp_path / "books") == {"A.TXT": "a", "again/b.txt": "b"}
    (tmp_path / "books" / "c.JSONL.GZ").write_bytes(gzip.compress(b'{"text":"c"}'))
    assert read("jsonl", tmp_path / "books") == {"c.JSONL.GZ:1": "c"}
