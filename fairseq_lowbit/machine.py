"""The processor this runs on; standard library only, for the doctor of broken installations."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

# Instruction sets that low-bit arithmetic profits from: flag in /proc/cpuinfo -> usual name.
_X86_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_vpopcntdq": "avx512_vpopcntdq",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx",
}
_ARM_FEATURES = {"asimd": "neon", "asimddp": "dotprod", "sve": "sve"}


@dataclass(frozen=True)
class Machine:
    """What a measured time depends on."""

    cpu: str
    cores: int  # that this process may use
    # Those that low-bit arithmetic profits from; None where the system does not tell.
    instruction_sets: tuple[str, ...] | None

    def __str__(self) -> str:
        sets = self.instruction_sets
        known = "not known on this system" if sets is None else " ".join(sets) or "none"
        return f"{self.cpu}, {self.cores} cores; low-bit instructions: {known}"


def this_machine() -> Machine:
    cpuinfo = _CPUINFO.read_text(encoding="utf-8") if _CPUINFO.exists() else None
    features = None if cpuinfo is None else tuple(cpu_features(cpuinfo))
    return Machine(cpu_name(cpuinfo or ""), usable_cores(), features)


def cpu_name(cpuinfo: str) -> str:
    """The model in the text of /proc/cpuinfo, else what the interpreter knows of the processor."""
    found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_features(cpuinfo: str) -> list[str]:
    """Names of the useful instruction sets in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        known = {"flags": _X86_FEATURES, "Features": _ARM_FEATURES}.get(key.strip())
        if known is not None:
            flags = set(value.split())
            return [name for flag, name in known.items() if flag in flags]
    return []


def usable_cores() -> int:
    """Cores that this process may run on, which a container or a scheduler may have reduced."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
