"""A run keeps the memory that its rounds let go of."""

import os
import subprocess
import sys

import pytest

from fedsim import heap

CODE = """
import resource
from fedsim import heap
kept = heap.keep()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (40 << 20)  # NumPy would ask for large pages, which there may be or not
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
heap.give_back()
print(kept, second < first / 10, faults() > first / 2)
heap.release()
faults()
print(faults() > first / 2)
"""


@pytest.mark.skipif(heap._libc("mallopt") is None, reason="no glibc")
@pytest.mark.parametrize(
    ("given", "expected"), [({}, "True True True"), ({"MALLOC_MMAP_MAX_": "65536"}, "False False True")]
)
def test_what_is_freed_is_kept_unless_somebody_else_decides(given, expected):
    own = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CODE], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [expected, "True"]
