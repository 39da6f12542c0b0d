"""Sizes of memory as people write them: 24GiB, 24G, 24GB, 80000MiB.

As GNU coreutils reads them (info coreutils "Block size"): a letter alone or with iB counts in powers of 1024, with B in
powers of 1000. So 24G and 24GiB are 25,769,803,776 bytes, and 24GB are 24,000,000,000. Bytes without a unit are taken
from a mebibyte on: fewer are a unit forgotten.
"""

import re

from research.config import ConfigError

PREFIXES = "KMGT"
MOST = 2**60  # bytes: more than any device has
PATTERN = re.compile(rf"([0-9]+(?:\.[0-9]+)?)\s*(?:([{PREFIXES}])(iB|B)?|B)?", re.IGNORECASE)


def parse(text: str, field: str) -> int:
    """Bytes of a size. Raises: ConfigError naming `field` where it is none, or not more than 0."""
    found = PATTERN.fullmatch(str(text).strip())
    size = 0
    if found:
        number, prefix, unit = found.groups()
        base = 1000 if unit and unit.lower() == "b" else 1024
        size = float(number) * base ** (1 + PREFIXES.index(prefix.upper()) if prefix else 0)
        size = int(size) if size < MOST else 0
    if 1 <= size < 2**20 and str(text).strip()[-1].isdigit():
        raise ConfigError(field, text, f"is {size} bytes; write a unit, such as {found[1]}GiB")
    if not 1 <= size < MOST:
        message = "not a size of memory; write 24GiB (or 24G: powers of 1024), 24GB (powers of 1000), or 512MiB"
        raise ConfigError(field, text, message)
    return size


def show(size: float) -> str:
    """Such as 23.4 GiB: three digits or so."""
    power = 0
    while abs(size) >= 1024 and power < len(PREFIXES):
        size, power = size / 1024, power + 1
    unit = f"{PREFIXES[power - 1]}iB" if power else "B"
    return f"{size:.0f} {unit}" if power == 0 or abs(size) >= 100 else f"{size:.2f} {unit}"
