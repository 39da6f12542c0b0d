"""Trains one config.

    python -m experiments.train --config=configs/balanced.py:cpu --workdir=runs/balanced --config.train.steps=50

The same command goes on where it was stopped. Exit codes: 0, finished; 2, a mistake in the config (nothing written);
3, the loss is not finite; 4, no checkpoint can be read; 130 or 143, stopped by Ctrl-C or SIGTERM, saved.
"""

import logging
import sys
from collections.abc import Sequence

from experiments.flags import read_flags
from research.config import ConfigError


def main(argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config, workdir = read_flags(argv, "train", __doc__)
        from research import train  # after the flags: a misspelt one is said before JAX has started
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = train.run(config, workdir)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except train.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except train.checkpoint.DamagedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    except train.signals.Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    suites = dict(result["eval"])
    losses = ", ".join(f"{s['loss']:.3f} at context {name}" for name, s in suites.pop("contexts").items())
    others = "".join(f"; {s['loss']:.3f} in windows of its {s['context']} tokens" for s in suites.values())
    print(f"held-out loss {losses}{others}")
    print(f"{workdir}/result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
