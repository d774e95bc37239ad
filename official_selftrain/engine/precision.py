"""Precisions that this machine's CPU computes slowly."""

import logging
import pathlib
import re

from official_selftrain.config import RuntimeConfig
from official_selftrain.utils.types import StrPath

# As /proc/cpuinfo calls the instructions of x86 and ARM that compute in 16 bits.
INSTRUCTIONS = {
    "mixed_bfloat16": {"avx512_bf16", "avx_ne_convert", "amx_bf16", "bf16"},
    "mixed_float16": {"avx512_fp16", "amx_fp16", "asimdhp"},
}


def warn_if_slow(precision: str, runtime: RuntimeConfig) -> None:
    """Logs a warning if steps run on a CPU that has no instructions for a precision.

    Args:
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        runtime: where the steps run.
    """
    import tensorflow as tf

    if precision == "float32" or runtime.jit_compile:
        return
    on_cpu = runtime.strategy in ("default", "mirrored")
    if on_cpu and not tf.config.list_physical_devices("GPU") and cpu_lacks(precision):
        logging.warning(
            "task.precision=%s is up to ten times slower than float32 on this CPU, which has no "
            "instructions for it; runtime.jit_compile=true helps", precision,
        )  # fmt: skip


def cpu_lacks(precision: str, cpuinfo: StrPath = "/proc/cpuinfo") -> bool:
    """Whether the CPU is known to have no instructions for a precision."""
    try:
        text = pathlib.Path(cpuinfo).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return bool(flags) and not INSTRUCTIONS[precision] & set(flags[0].split())
