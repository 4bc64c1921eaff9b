"""The worker on the peers' side: torch, bitsandbytes and PEFT. compare.py starts it and its counterpart in main.rs.

Reads a case a line and answers each with one line of JSON: the seconds of every timed run, or why it cannot be run. A
case stays built until the line "forget". The first line of output says what this worker is.

With --memory CASE it runs that case alone and answers with resident bytes (Linux); with --share CASE it answers with
the share of the time that is spent outside matrix products.
"""

import argparse
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

# Without the package `kernels`, which would download another kernel, bitsandbytes uses its own and says so each time.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from bitsandbytes.functional import has_avx512bf16  # noqa: E402

from subjects import Case, build  # noqa: E402

# What the comparison depends on, by the names of their distributions.
PEERS = ("torch", "bitsandbytes", "peft", "transformers", "accelerate")
# Runs of a case whose memory is looked at, after which a peak does not grow any more.
MEMORY_RUNS = 3


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(json.dumps(answer(args.memory, lambda: memory(args.memory))))
        return
    if args.share:
        print(json.dumps(answer(args.share, lambda: outside_products(args.share))))
        return
    say(about())
    built = {}
    for line in sys.stdin:
        line = line.strip()
        if line == "forget":
            built.clear()
            continue
        say(answer(line, lambda: timed(line, built, args)))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="time for the runs of a case at each request")
    parser.add_argument("--runs", type=int, default=2, help="runs at each request, however long they take")
    parser.add_argument("--memory", metavar="CASE")
    parser.add_argument("--share", metavar="CASE")
    return parser.parse_args()


def about():
    return {
        **{name: version(name) for name in PEERS},
        "threads": torch.get_num_threads(),
        "cpu capability of torch": torch.backends.cpu.get_cpu_capability(),
        "bf16 kernel of bitsandbytes": bool(has_avx512bf16()),
    }


def say(value):
    print(json.dumps(value), flush=True)


def answer(name, result):
    """Whatever goes wrong with a case is said in the answer, and does not end the worker."""
    try:
        return {**result(), "case": name}
    except Exception as error:  # noqa: BLE001
        return {"case": name, "error": f"{type(error).__name__}: {error}"}


def timed(name, built, args):
    """One run to warm up, then as many as fit."""
    if name not in built:
        built[name] = build(Case.parse(name))
    run = built[name]
    run()
    started = time.perf_counter()
    seconds = []
    while len(seconds) < args.runs or time.perf_counter() - started < args.seconds:
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": seconds}


def memory(name):
    """Peaks of the resident set, of building and of running, less the resident set before anything is built."""
    case = Case.parse(name)
    if small := case.small():
        # Starts threads and loads what libraries load late.
        build(small)()
    before = resident("VmRSS")
    reset_peak()
    run = build(case)
    building = resident("VmHWM")
    reset_peak()
    for _ in range(MEMORY_RUNS):
        run()
    peak = resident("VmHWM")
    return {"before": before, "build": building - before, "peak": peak - before}


def resident(field):
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    kib = next(line for line in status if line.startswith(field)).split()[1]
    return int(kib) << 10


def reset_peak():
    """Lets the peak begin again at the present resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def outside_products(name):
    """By torch's profiler: the share of operations that are neither a matrix product nor attention."""
    run = build(Case.parse(name))
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            run()
    products = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "attention")
    total = inside = 0.0
    for event in profiler.key_averages():
        total += event.self_cpu_time_total
        if any(name in event.key for name in products):
            inside += event.self_cpu_time_total
    return {"outside_products": 1 - inside / total}


if __name__ == "__main__":
    main()
