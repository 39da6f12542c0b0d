"""What a person types: help that helps, and one line for a mistake."""

import importlib
import re

import pytest

from experiments import flags, train
from research.config import ConfigError

SCRIPTS = (
    "ablation", "benchmark", "memory_check", "memory_frontier", "memory_step", "scale", "trace", "train", "waterfall",
)  # fmt: skip


def call(script: str, *arguments: str) -> None:
    raise SystemExit(importlib.import_module(f"experiments.{script}").main(list(arguments)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_a_script_does_and_what_each_argument_is(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(script, "--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"python -m experiments.{script}" in said
    assert importlib.import_module(f"experiments.{script}").__doc__.strip().splitlines()[0] in said
    for option in re.split(r"\n  (?=-)", said.split("options:")[1])[1:]:
        assert re.fullmatch(r"(-h, )?--\w+( [A-Z_:]+)?\s+\S.*", option, re.DOTALL), option


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("waterfall", ["--workdir=w", "--until=x"], "argument --until: invalid int value: 'x'"),
        ("ablation", [], "--workdir"),
        ("benchmark", ["--out"], "argument --out: expected one argument"),
        ("memory_check", ["--workdir=w", "--huh"], "unrecognized arguments: --huh"),
        ("scale", ["--workdir=w", "--tokens=a\nb"], "--tokens"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(script, arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(script, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and named in error


def test_a_value_may_follow_its_name_after_a_space():
    given = ["--config", "configs/balanced.py:cpu", "--workdir", "~/runs", "--config.train.steps=7"]
    config, workdir = flags.read_flags(given, "train", "")
    assert (config.train.steps, config.train.tokens, config.strategy) == (7, None, "balanced")
    assert workdir.endswith("/runs") and "~" not in workdir


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.train.steps", "7"], "argument='--config.train.steps': unknown; give --config=FILE:SCALE"),
        (["--confg=x"], "argument='--confg=x'"),
        (["--config=configs/balanced.py:cpu"], "--workdir=unset: give it, such as --workdir=runs/balanced"),
        (["--workdir=w"], "--config=unset: give it, such as --config=configs/balanced.py:cpu"),
        (["--config=", "--workdir=w"], "--config=unset"),
    ],
)
def test_what_train_is_given_is_named_where_it_is_wrong(arguments, named, capsys):
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    with pytest.raises(ConfigError):
        flags.read_flags(arguments, "train", "")
