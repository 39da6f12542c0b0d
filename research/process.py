"""What the operating system says of this process. Imports nothing heavy: it must not change what it measures."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size of this process since it began.

    On Linux ru_maxrss begins at the parent's: the kernel's own high-water mark (VmHWM) does not.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024  # written in kB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
