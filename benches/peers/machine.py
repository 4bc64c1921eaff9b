"""On what a comparison was run: processor, memory, system, and the versions of our side."""

import os
import platform
import subprocess
import tomllib

from workers import MALLOC, ROOT

# Instructions that the kernels here or there choose between.
INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
)


def machine(threads, features):
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    versions = {package["name"]: package["version"] for package in lock["package"]}
    cpu = cpu_info()
    flags = cpu.get("flags", "").split()
    return {
        "processor": cpu.get("model name", platform.processor()),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "load_average_after": os.getloadavg()[0],
        "python": platform.python_version(),
        "rustc": output("rustc", "--version"),
        "burn": versions["burn"],
        "features": features or "default",
        "commit": output("git", "describe", "--always", "--dirty"),
        "malloc_tuned": MALLOC,
    }


def cpu_info():
    """The first processor of /proc/cpuinfo."""
    with open("/proc/cpuinfo") as file:
        pairs = (line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
        return {key.strip(): value.strip() for key, value in pairs}


def output(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
