"""A script's --config=file.py:scale, --config.field=value and --workdir, with one clear line for each mistake."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from research.config import ConfigError

EXAMPLES = dict(config="configs/balanced.py:cpu", workdir="runs/balanced")
OVERRIDES = "Any number of --config.FIELD=VALUE change the config: configs/base.py names every field and what it means."


class Parser(argparse.ArgumentParser):
    """Of a script: --help prints its docstring and what each argument is; a mistake is one line, exit code 2."""

    def __init__(self, script: str, doc: str, epilog: str = ""):
        super().__init__(
            prog=f"python -m experiments.{script}",
            description=doc,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_modes(self) -> None:
        """Of a study: what it may do instead of its runs."""
        mode = self.add_mutually_exclusive_group()
        mode.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
        mode.add_argument("--check_only", action="store_true", help="check the configs, run nothing")
        mode.add_argument("--report_only", action="store_true", help="make the report again, run nothing")

    def parse_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """The arguments, and {field: value} of each `--config.field=value`. Raises: ConfigError on another."""
        arguments, rest = self.parse_known_args(argv)
        given = {}
        for argument in rest:
            name, equals, value = argument.partition("=")
            if not name.startswith("--config.") or not equals:
                raise ConfigError("argument", argument, "unknown; write overrides as --config.field=value")
            given[name.removeprefix("--config.")] = value
        return arguments, given

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def read_flags(argv: Sequence[str], script: str, doc: str) -> tuple[ConfigDict, str]:
    """(config, workdir) of `--config=... --workdir=... [--config.field=value ...]`, of a script with that docstring.

    Raises: ConfigError for an argument that is unknown, missing or wrong.
    """
    parser = Parser(script, doc, OVERRIDES)
    parser.add_argument("--config", metavar="FILE:SCALE", help=f"such as {EXAMPLES['config']}")
    parser.add_argument("--workdir", metavar="FOLDER", help="of the run: its config, metrics, checkpoints and result")
    arguments, rest = parser.parse_known_args(argv)
    for argument in rest:
        if not (argument.startswith("--config.") and "=" in argument):
            known = "give --config=FILE:SCALE, --workdir=FOLDER, --config.FIELD=VALUE"
            raise ConfigError("argument", argument, f"unknown; {known}")
    for name, example in EXAMPLES.items():
        if not getattr(arguments, name):
            raise ConfigError(f"--{name}", None, f"give it, such as --{name}={example}")
    return load_config(arguments.config, rest), str(as_folder(arguments.workdir))


def as_folder(name: str) -> Path:
    """As every script reads a folder: a shell leaves the ~ of --workdir=~/runs to us."""
    return Path(os.path.expanduser(name))


def without_folder(argv: Sequence[str]) -> list[str]:
    """The arguments without --workdir, which says nothing about what was computed."""
    pairs = zip(["", *argv], argv, strict=False)
    return [given for before, given in pairs if not given.startswith("--workdir") and before != "--workdir"]


def check_folder(folder: Path) -> None:
    """Leaves nothing. Raises: ConfigError where a folder cannot be made, or not be written in."""
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError("--workdir", str(folder), f"cannot be made: {error.strerror}") from None


def make_folder(folder: Path) -> None:
    """Raises: ConfigError where it cannot be made, or not be written in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("--workdir", str(folder), f"cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError("--workdir", str(folder), "cannot be written in")


def load_config(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `file.py[:scale]` with `--config.field=value` overrides.

    Raises: ConfigError for a file, scale, field or value that is not there.
    """
    file, colon, scale = name.partition(":")
    if not Path(file).is_file() or not file.endswith(".py"):
        raise ConfigError("--config", name, f"no such file {file}; name one of Python, such as configs/balanced.py:cpu")
    if colon and scale not in base.SCALES:
        raise ConfigError("--config", name, f"no scale {scale}; choose one of {', '.join(base.SCALES)}")
    config = _parse([f"--config={name}"])
    for override in overrides:
        field, equals, value = override.removeprefix("--").partition("=")
        if not equals or not field.startswith("config."):
            raise ConfigError("argument", override, "write overrides as --config.FIELD=VALUE")
        path = field.removeprefix("config.")
        try:
            known = config_flags.config_path.get_value(path, config)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise ConfigError(field, value, "no such field; configs/base.py names them all") from None
        if isinstance(known, ConfigDict):
            raise ConfigError(field, value, f"is a group; set one of its fields: {', '.join(known)}")
        try:
            _parse([f"--config={name}", override])
        except (flags.Error, IndexError, TypeError, ValueError) as error:
            message = str(error).splitlines()[0].removeprefix(f"flag {override}: ")
            raise ConfigError(field, value, message) from None
    config = _parse([f"--config={name}", *overrides])
    given = {override.partition("=")[0].removeprefix("--config.train.") for override in overrides}
    for length, other in (("steps", "tokens"), ("tokens", "steps")):
        if length in given and other not in given:
            config.train[other] = None  # a length on the command line replaces the file's
    return config


def _parse(arguments: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    argv = ["train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    values(argv)
    return values.config
