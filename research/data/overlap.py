"""Does the held-out text occur in the train split? N-grams of tokens that both hold.

Splitting by document does not help against texts that quote, copy or license one another. What is found is reported
beside the losses; nothing is removed.
"""

import numpy as np

SIZES = (8, 13, 50)  # tokens; 13 is what Brown et al. (2020, arXiv:2005.14165) call contaminated
CHUNK = 1 << 20  # train n-grams looked at once
FILTER_BITS = 27  # at most 128 MiB


def overlap(
    train: np.ndarray, heldout: np.ndarray, heldout_starts: np.ndarray, sizes: tuple[int, ...] = SIZES
) -> dict[str, dict[str, float] | None]:
    """For each size, shares of the held-out n-grams (inside one document) that occur anywhere in train, and of the
    held-out documents of which more than half of the n-grams do. None where no held-out document is so long.

    train, heldout: tokens [N]; heldout_starts: where held-out documents start. N-grams are found by hashes of 64 bits
    and compared token by token, so what is counted is there. One could be missed only where two distinct held-out
    n-grams share a hash: for ten million random ones a chance of 3e-6 that any two do.
    Memory: about 50 bytes a held-out token, and 150 MB beside, however long train is.
    """
    random_V = _random(int(max(train.max(initial=0), heldout.max(initial=0))) + 1)
    return {str(n): _shares(train, heldout, heldout_starts, n, random_V) for n in sizes}


def _shares(train, heldout, starts, n, random_V) -> dict[str, float] | None:
    owners = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(heldout)))
    places = np.flatnonzero(owners[: len(owners) - n + 1] == owners[n - 1 :]) if len(owners) >= n else owners[:0]
    if not len(places):
        return None
    wanted, which = np.unique(_hashes(random_V[heldout], n)[places], return_inverse=True)
    example = np.empty(len(wanted), np.int64)
    example[which] = places  # one place of each
    hit = _found(train, heldout, wanted, example, n, random_V)[which]
    hit[hit] = _same(heldout, places[hit], heldout, example[which[hit]], n)
    owner = owners[places]
    ngrams_D, hits_D = np.bincount(owner, minlength=len(starts)), np.bincount(owner, hit, len(starts))
    long = ngrams_D > 0
    return dict(ngrams=float(hit.mean()), documents=float((2 * hits_D > ngrams_D)[long].mean()))


def _found(train, heldout, wanted, example, n, random_V) -> np.ndarray:
    """bool: whether the n-gram of each hash of `wanted` (rising), to be seen at `example` in heldout, is in train."""
    found = np.zeros(len(wanted), bool)
    bits = min(FILTER_BITS, (8 * len(wanted)).bit_length())
    shift = np.uint64(64 - bits)
    possible = np.zeros(1 << bits, bool)  # by the upper bits: most train n-grams are ruled out without a search
    possible[wanted >> shift] = True
    for start in range(0, len(train) - n + 1, CHUNK):
        seen = _hashes(random_V[train[start : start + CHUNK + n - 1]], n)
        places = np.flatnonzero(possible[seen >> shift])
        at = np.minimum(np.searchsorted(wanted, seen[places]), len(wanted) - 1)
        new = (wanted[at] == seen[places]) & ~found[at]
        places, at = start + places[new], at[new]
        found[at[_same(train, places, heldout, example[at], n)]] = True
    return found


def _same(a, places_a, b, places_b, n) -> np.ndarray:
    """Whether the n tokens from each place of `a` are those from the place of `b`."""
    same = np.ones(len(places_a), bool)
    for i in range(n):
        same &= a[places_a + i] == b[places_b + i]
    return same


def _hashes(values: np.ndarray, n: int) -> np.ndarray:
    """uint64 [N - n + 1]: sum over j of values[i + j] * B^(n - 1 - j) modulo 2^64, by doubling."""
    base, modulus = 0x9E3779B97F4A7C15, 1 << 64  # odd: no token drops out
    total, size, power = np.zeros(len(values) + 1, np.uint64), 0, 1  # of no token; power: base^size
    for bit in f"{n:b}":
        total = total[: len(total) - size] * np.uint64(power) + total[size:]
        size, power = 2 * size, power * power % modulus
        if bit == "1":
            total = total[:-1] * np.uint64(base) + values[size : size + len(total) - 1]
            size, power = size + 1, power * base % modulus
    return total


def _random(size: int) -> np.ndarray:
    """uint64 [size], the same on every machine."""
    return np.random.PCG64(0).random_raw(size)
