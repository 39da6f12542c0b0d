"""Byte-level BPE: the bytes of a text's tokens sum to the text's, or the tokenizer is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from configs import base
from research.config import ConfigError
from research.data.tokenizer import EOT, LONGEST, _bounded, encode, eot_id, load_tokenizer, token_bytes
from research.data.tokens import open_corpus
from tests.test_tokens import WORDS, corpus_config, refuse


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    config = base.get_config("cpu")
    config.model.vocab_size = 500
    bpe = load_tokenizer(config, ["the <|endoftext|> of the straße 日本 the of"] * 9)
    config.data.tokenizer = "bytes"
    return {"bpe": bpe, "bytes": load_tokenizer(config, [])}


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text() | st.sampled_from(WORDS), max_size=5))
@pytest.mark.parametrize("name", ["bpe", "bytes"])
def test_bytes_of_a_texts_tokens_sum_to_its_bytes(trained, name, texts):
    tokenizer = trained[name]
    sizes_V = token_bytes(tokenizer)
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert sizes_V[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
        assert eot_id(tokenizer) not in ids  # written out in a text it is text


@pytest.mark.parametrize("letter", ["a", " ", "日"])
def test_a_tokenizer_is_trained_on_words_of_bounded_length(letter):
    config = base.get_config("cpu")
    config.model.vocab_size = 400
    learnt = load_tokenizer(config, [letter * 20_000])
    assert 500 < token_bytes(learnt).max() <= LONGEST * len(letter.encode())  # powers of two of bytes: 512 or more
    rest = f"{'x' * (LONGEST - 1)}  {letter * (2 * LONGEST + 5)}\n y"
    pieces = list(_bounded(["a b", "", rest]))
    assert "".join(pieces) == f"a b{rest}" and pieces[:2] == ["a b", ""] and len(pieces) == 5


def test_end_of_text_is_0_and_stands_for_no_bytes(trained):
    for tokenizer in trained.values():
        assert tokenizer.token_to_id(EOT) == 0 and token_bytes(tokenizer)[0] == 0
    assert len(token_bytes(trained["bytes"])) == 257
    assert (token_bytes(trained["bytes"])[1:] == 1).all()


def save_tokenizer(path: Path, vocabulary: dict[str, int], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return tokenizer


SPLIT = r"\p{N}{1,3}|\s?\p{L}+|\s+|[^\s\p{L}\p{N}]+"  # a regular expression such as Llama 3's


def described(**fields) -> dict:
    """A tokenizer of the 256 bytes and two merges, described as published ones are, with `fields` of it replaced."""
    space = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ã©"]
    model = {"type": "BPE", "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"vocab": {token: i for i, token in enumerate(letters)}, "merges": ["Ġ t", "Ã ©"], "ignore_merges": True}
    described = {"version": "1.0", "normalizer": None, "pre_tokenizer": space | {"add_prefix_space": False}}
    described |= {"post_processor": space, "decoder": space, "added_tokens": [added(258, EOT, special=True)]}
    model |= fields.pop("model", {})
    return {**described, "model": model, **fields}


def added(index: int, content: str, **fields) -> dict:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": index, "content": content} | dict.fromkeys(names, False) | fields


def cut(*cuts: dict) -> dict:
    """Pieces by `cuts`, then spelled."""
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*cuts, spelled]}


def split(behavior: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": behavior, "invert": False}


def load_described(folder: Path, description: dict) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(description))
    config = base.get_config("cpu")
    config.data.tokenizer = str(folder)
    return load_tokenizer(config, [])


def vocabulary(*more: str, without: str = "") -> dict:
    known = [token for token in (*described()["model"]["vocab"], *more) if token not in without]
    return {"vocab": {token: i for i, token in enumerate(known)}}


PUBLISHED = {
    "GPT-2": {},
    "SmolLM": dict(pre_tokenizer=cut({"type": "Digits", "individual_digits": True})),
    "Llama 3": dict(pre_tokenizer=cut(split("Isolated"))),
    "Qwen": dict(
        pre_tokenizer=cut(split("Isolated")), normalizer={"type": "NFC"},
        added_tokens=[added(258, EOT, special=True), added(259, "<tool_call>"), added(260, "<日本>")],
    ),
    "runs of spaces": dict(added_tokens=[added(258, EOT, special=True), added(259, "    ", normalized=True)]),
    "spelled by its normaliser": dict(pre_tokenizer=split("Isolated"), normalizer={"type": "ByteLevel"}),
    "an unknown token that nothing is": dict(model={"unk_token": "Ġt"}),
    "a special token in the vocabulary, spelled as it reads": dict(
        model=vocabulary("<é 日>"), added_tokens=[added(258, "<é 日>", special=True), added(259, EOT, special=True)],
    ),
    "no token for bytes that UTF-8 never has": dict(model=vocabulary(without="ÀÁõö÷øùúûüýþÿ")),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_tokenizers_as_they_are_published_are_counted_exactly(tmp_path, name):
    tokenizer = load_described(tmp_path, described(**PUBLISHED[name]))
    sizes_V = token_bytes(tokenizer)
    texts = [f" the  straße\r\n\t{EOT}<tool_call> 日本 1234    <日本>", "\0\u00a0😀 x"]
    for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
        assert sizes_V[ids].sum() == len(text.encode()) and eot_id(tokenizer) not in ids


INEXACT = {
    "an end of words": (dict(model={"end_of_word_suffix": "t"}), "end_of_word_suffix='t'"),
    "a prefix inside words": (
        dict(model={"continuing_subword_prefix": "Ġ", "merges": []}),
        "continuing_subword_prefix='Ġ'",
    ),
    "chance": (dict(model={"dropout": 0.1}), "dropout=0.1"),
    "a space before the text": (dict(pre_tokenizer=described()["post_processor"]), "set add_prefix_space"),
    "bytes without a token": (dict(model=vocabulary(without="aÿâĊ")), "no token for 3 of the bytes"),
    "unknown bytes": (dict(model=vocabulary(without="a") | {"unk_token": "Ġt"}), "no token for 1 of the bytes"),
    "what it cuts at": (dict(pre_tokenizer=cut(split("Removed"))), "removes what it cuts at"),
    "white space": (dict(pre_tokenizer=cut({"type": "WhitespaceSplit"})), "of a text of every byte stand for "),
    "spaces around a token": (
        dict(added_tokens=[added(258, EOT, special=True), added(259, "<x>", lstrip=True)]),
        "'a <x> b' stand for 6 bytes, not 7",
    ),
    "an end that is text": (dict(added_tokens=[added(258, EOT)]), "can spell its end-of-text <|endoftext|>"),
    "an end in the vocabulary": (dict(added_tokens=[], model=vocabulary(EOT)), "can spell its end-of-text"),
    "an end that words reach": (
        dict(pre_tokenizer=cut(), model=vocabulary("</s>"), added_tokens=[added(258, "</s>", special=True)]),
        "'</s>' stand for 0 bytes, not 4",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_tokenizers_whose_tokens_are_not_the_bytes_of_a_text_are_refused(tmp_path, name):
    fields, said = INEXACT[name]
    with pytest.raises(ConfigError, match="^config.data.tokenizer=") as error:
        load_described(tmp_path, described(**fields))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_tokenizer_file_may_be_large_and_ask_for_truncation(tmp_path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {a + b: 256 + i * 256 + j for i, a in enumerate(letters) for j, b in enumerate(letters)}
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", vocabulary, [EOT])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = corpus_config(tmp_path, documents=20, tokenizer=str(tmp_path / "tokenizer.json"))
    config.model.vocab_size = 256 + 65536 + 1
    corpus = open_corpus(config)
    assert corpus.train.dtype == np.uint32 and corpus.eot == 65792
    assert corpus.train[corpus.train_starts[1] - 1] == 65792
    counts = [corpus.manifest[split]["bytes"] for split in ("train", "heldout")]
    assert sum(counts) == sum(path.stat().st_size for path in Path(config.data.path).iterdir())
    tokenizer.add_special_tokens(["<more>"])  # another tokenizer at the same path is another corpus
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert "has 65794 tokens" in refuse(config)


def test_bad_tokenizers_are_refused(tmp_path, monkeypatch):
    def message(tokenizer: str, vocab_size: int = 400) -> str:
        config = corpus_config(tmp_path, documents=20, tokenizer=tokenizer)
        config.model.vocab_size = vocab_size
        return refuse(config)

    assert message("bpe", 256).startswith("config.model.vocab_size=256")
    assert message("bytes", 256).startswith("config.model.vocab_size=256")
    missing = str(tmp_path / "none.json")
    assert message(missing).startswith(f"config.data.tokenizer='{missing}': cannot be read")
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    assert "no tokenizer.json" in message(str(tmp_path / "bad.json"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    save_tokenizer(tmp_path / "eot.json", {letter: i for i, letter in enumerate(letters)}, ["<pad>"])
    assert "no end-of-text token" in message(str(tmp_path / "eot.json"))
    save_tokenizer(tmp_path / "word.json", {"▁a": 0, "b": 1}, [EOT])
    assert "no byte-level BPE" in message(str(tmp_path / "word.json"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused = message("own/tokenizer")  # by the one question asked first, without retries
    assert "not readable from the Hugging Face hub" in refused and "refused" in refused
    assert "not readable from the Hugging Face hub" in message("a/b/c")


def test_a_tokenizer_that_ends_the_librarys_process_or_panics_is_refused_in_one_line(tmp_path):
    file = tmp_path / "tokenizer.json"
    save_tokenizer(file, {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, [EOT])
    good = json.loads(file.read_text())
    config = corpus_config(tmp_path, documents=20, tokenizer=str(file))
    far = {**good["model"]["vocab"], "Ġ": 4_000_000_000}
    file.write_text(json.dumps({**good, "model": {**good["model"], "vocab": far}}))
    assert "has 4000000001 tokens" in refuse(config)
    file.write_text(json.dumps({**good, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}))
    assert "no tokenizer.json" in refuse(config) and "\n" not in refuse(config)
    file.write_text("[" * 100_000)
    assert "no tokenizer.json" in refuse(config)


def test_a_tokenizer_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def message(name: str) -> str:
        return refuse(corpus_config(tmp_path, documents=20, tokenizer=str(tmp_path / name)))

    said = "': cannot be read: "
    (tmp_path / "folder").mkdir()
    assert said in message("folder") and "No such file" in message("folder")
    (tmp_path / "folder" / "tokenizer.json").symlink_to("nowhere")
    assert said in message("folder")
    (tmp_path / "link.json").symlink_to("nowhere")
    assert said in message("link.json")
    os.mkfifo(tmp_path / "pipe")
    assert said in message("pipe")
    assert said in message("n" * 300)
    real = Path.open

    def locked(path, *arguments, **fields):
        if path.name == "locked.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **fields)

    (tmp_path / "locked.json").touch()
    monkeypatch.setattr(Path, "open", locked)
    assert f"{said}[Errno 13] Permission denied" in message("locked.json")
    (tmp_path / "new.json").write_text('{"version": "1\\n0"}')
    assert "no tokenizer.json: " in message("new.json")
