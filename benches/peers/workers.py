"""Builds our worker, starts both kinds, and talks to them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from cases import OURS, PYTHON, TUNED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# glibc gives large buffers back to the system at each free, and gets them anew, page by page, at the next allocation.
# This lets it keep them.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}

# After work OpenMP's threads stay on their cores for some milliseconds; the other side must not start before.
SETTLE = 0.05


def build(features):
    """Builds our workers with `cargo bench --no-run`; returns their paths by target."""
    command = ["cargo", "bench", "--no-run", "--message-format=json", "--bench", "peers", "--bench", "peers_live"]
    if features:
        command += ["--features", features]
    # A pipe for the messages; errors of the compiler stay on the terminal.
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if output.returncode:
        for message in map(json.loads, output.stdout.splitlines()):
            if message.get("reason") == "compiler-message":
                print(message["message"]["rendered"], file=sys.stderr)
        sys.exit("our workers do not build")
    messages = map(json.loads, output.stdout.splitlines())
    return {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}


class Workers:
    """One process of each kind, started when first asked, all with the same number of threads."""

    def __init__(self, binaries, threads, seconds, runs):
        self.binaries = binaries
        self.threads = threads
        self.options = ["--seconds", str(seconds), "--runs", str(runs)]
        self.processes = {}
        self.about = {}

    def ask(self, kind, case):
        """The seconds of the timed runs of a case, or a string that says why there are none."""
        try:
            process = self.processes.get(kind) or self.start(kind)
            answer = self.send(process, case)
        except (BrokenPipeError, EOFError):
            self.processes.pop(kind, None)
            return f"the worker ended at {case}"
        time.sleep(SETTLE)
        return answer.get("seconds") or answer.get("error", "no answer")

    def forget(self):
        """Frees what was built for the cases so far."""
        for process in self.processes.values():
            process.stdin.write("forget\n")
            process.stdin.flush()

    def close(self):
        for process in self.processes.values():
            process.stdin.close()
            process.wait()
        self.processes.clear()

    def memory(self, kind, case):
        """Bytes of a case in a process of its own, or a string that says why there are none."""
        answer = self.once(self.command(kind) + ["--memory", case], kind)
        if isinstance(answer, dict) and kind == OURS:
            live = self.once([self.binaries["peers_live"], case], kind)
            answer = {**answer, "live": live["live"]} if isinstance(live, dict) else live
        return answer

    def outside_products(self, case):
        """The share of a peer's time outside matrix products, or a string that says why there is none."""
        answer = self.once(self.command(PYTHON) + ["--share", case], PYTHON)
        return answer["outside_products"] if isinstance(answer, dict) else answer

    def once(self, command, kind):
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self.environment(kind), text=True)
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            return f"the process ended with status {done.returncode}"
        answer = json.loads(lines[-1])
        return answer.get("error", answer)

    def start(self, kind):
        process = subprocess.Popen(
            self.command(kind) + self.options,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self.environment(kind),
            text=True,
        )
        self.processes[kind] = process
        self.about[kind] = self.read(process)
        return process

    def send(self, process, line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return self.read(process)

    @staticmethod
    def read(process):
        line = process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def command(self, kind):
        if kind == OURS:
            return [self.binaries["peers"]]
        assert kind in (PYTHON, TUNED), kind
        return [sys.executable, "-W", "ignore", str(HERE / "peers.py"), "--threads", str(self.threads)]

    def environment(self, kind):
        threads = str(self.threads)
        environment = {
            **os.environ,
            "RAYON_NUM_THREADS": threads,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # The models are made here; nothing is to be looked up.
            "HF_HUB_OFFLINE": "1",
            # The profiler need not say that there is no GPU.
            "KINETO_LOG_LEVEL": "5",
        }
        return {**environment, **MALLOC} if kind == TUNED else environment
