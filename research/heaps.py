"""The memory that a step works in on a CPU, kept from one step to the next.

XLA asks the C library for it at every step. Left alone, that gets so much from the system and gives it back each time:
48,000 page faults a step of `cpu` scale, a tenth of its time. glibc keeps what fits into its heaps, if it is told to;
so XLA has to ask for blocks of such a size. A program in blocks is one that XLA cannot put on disk: JAX's compilation
cache does without it, and each run compiles it anew. So a short run's is not in blocks.
"""

import ctypes
import math
import os
import sys
import warnings
from typing import Any

from research.jaxprs import largest_array
from research.sharding import platform

BLOCK = 20 * 2**20  # bytes; three to a heap
LONG = 150  # steps, of some 50 ms less each, that make up for compiling, 5 to 7 s at `cpu` scale
KEEP = {  # glibc's options, by their numbers in its malloc.h
    -3: 32 * 2**20,  # M_MMAP_THRESHOLD, the highest there is: what is smaller comes out of heaps, of 64 MiB each
    -2: 64 * 2**20,  # M_TOP_PAD: a heap that is empty stays
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: and so does its end
}


def keep() -> None:
    """The C library keeps what it is given back, for who asks next; unless it has been told something else."""
    if sys.platform != "linux" or variables():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # it is glibc
        for option, value in KEEP.items():
            mallopt(option, value)


def variables() -> dict[str, str]:
    """Those of the environment that tell glibc how to allocate."""
    return {k: v for k, v in os.environ.items() if k == "GLIBC_TUNABLES" or k.startswith("MALLOC_")}


def compiled(traced: Any, steps: float = math.inf) -> Any:
    """A traced program (`jit(...).trace(...)`) of the mesh in use, compiled to be run so many times."""
    options = compiler_options(traced, steps)
    with warnings.catch_warnings():
        if options:
            warnings.filterwarnings("ignore", message="Error writing persistent compilation cache entry")
        return traced.lower().compile(compiler_options=options)


def compiler_options(traced: Any, steps: float = math.inf) -> dict[str, str] | None:
    """Its memory in blocks, where the mesh is a CPU's and it is run LONG times.

    Not where an array is larger than a block: XLA then lets none share its place, and a program can take twice as much.
    """
    if platform() != "cpu" or steps < LONG or largest_array(traced.jaxpr.jaxpr) > BLOCK:
        return None
    return {"xla_multiheap_size_constraint_per_heap": str(BLOCK)}
