"""What the benchmarks share: processes of their own, time, memory, and networks of golden weights.

It imports only the standard library at the top, because another environment's Python runs it too.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
_RESULT = "RESULT "


def report(result):
    """Prints a result (anything that JSON can hold) for the process that called `measured`."""
    print(_RESULT + json.dumps(result))


def measured(script, *arguments, python=sys.executable):
    """The result that a script reports from a process of its own; exits if it reports none."""
    command = [python, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not lines:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[0].removeprefix(_RESULT))


class Timing(NamedTuple):
    """Seconds of a function: of its first call, and the means over later calls."""

    first: float
    wall: float
    cpu: float


def timed(function, repeats):
    """Times a first call, which may trace and compile, and then the mean of `repeats` calls."""
    began = time.perf_counter()
    function()
    first = time.perf_counter() - began
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Timing(first, wall / repeats, cpu / repeats)


def print_speed(name, function, images, repeats):
    """Prints the speed of a function that processes `images`; returns wall seconds per call."""
    first, wall, cpu = timed(function, repeats)
    print(
        f"{name}: first {first:.1f} s, then {wall:.2f} s, {cpu:.2f} CPU s, "
        f"{images / wall:.3f} images/s"
    )
    return wall


def peak_megabytes():
    """The most memory that this process has had so far (Linux).

    `resource.getrusage` would begin at the peak of the parent, from which the process was forked.
    """
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) / 2**10


def resident_megabytes():
    """The memory that this process has now (Linux)."""
    pages = pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def golden_networks():
    """The module of the tests that builds networks with golden weights."""
    sys.path.insert(0, str(ROOT / "tests"))
    import golden_networks

    return golden_networks
