"""Compares burn-peft with torch, bitsandbytes and PEFT on this machine: one command, one table.

    pip install -r benches/peers/requirements.txt
    python benches/peers/compare.py            # the table: about a quarter of an hour
    python benches/peers/compare.py --curves   # how the time grows, as pictures

Both sides stay alive as workers and take turns, case by case, over several rounds; a ratio is that of the medians
within a round, given as the median over the rounds with the lowest and highest. Memory is measured in a fresh process
for each case. Writes performance.json, the tables in performance.md and the pictures. Ends with status 1 when a row is
missing, 2 when a peer has another version than requirements.txt.
"""

import argparse
import json
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import report
from cases import OURS, PYTHON, TUNED, curves, rows
from machine import machine
from workers import HERE, ROOT, Workers, build


def main():
    args = arguments()
    check_versions()
    chosen = [row for row in rows(args.quick) if re.search(args.only, row.title)]
    if not chosen:
        sys.exit(f"no row matches {args.only}")
    args.out.mkdir(parents=True, exist_ok=True)
    binaries = build(args.features)
    make_workers = lambda threads: Workers(binaries, threads, args.seconds, args.runs)  # noqa: E731
    result = {"command": shlex.join(["python", "benches/peers/compare.py", *sys.argv[1:]]), "rounds": args.rounds}
    if args.curves:
        result["curves"], result["workers"] = run_curves(make_workers, args)
        name = "performance-curves"
    else:
        result["rows"], result["workers"] = run_rows(make_workers(args.threads), chosen, args)
        name = "performance"
    result["machine"] = machine(args.threads, args.features)
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    report.write(args.out, result)
    missing = report.missing(result)
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    sys.exit(1 if missing else 0)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, small sizes")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose title matches")
    parser.add_argument("--curves", action="store_true", help="the growth curves in place of the table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="time for the runs of a case in a round")
    parser.add_argument("--runs", type=int, help="runs of a case in a round, however long they take")
    parser.add_argument("--features", default="", help="features to build burn-peft with, such as x86-v4")
    parser.add_argument("--no-memory", action="store_true", help="leave memory out")
    parser.add_argument("--out", type=Path, help="default: docs, but target/peers with --quick or --only")
    args = parser.parse_args()
    partial = args.quick or args.only
    args.out = args.out or ROOT / ("target/peers" if partial else "docs")
    args.rounds = args.rounds or (1 if args.quick else 3 if args.curves else 5)
    args.seconds = args.seconds or (0.02 if args.quick else 0.25)
    args.runs = args.runs or (1 if args.quick else 2)
    return args


def check_versions():
    """A comparison names what it compares with: exactly the pinned peers."""
    wrong = []
    for line in (HERE / "requirements.txt").read_text().splitlines():
        if "==" not in line or line.startswith("#"):
            continue
        name, wanted = line.split("==")
        try:
            # A build for one kind of machine has the same version with a suffix: 2.15.0+cpu.
            found = version(name).split("+")[0]
        except PackageNotFoundError:
            found = "not installed"
        if found != wanted:
            wrong.append(f"{name}: {wanted} is wanted, {found}")
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
        sys.exit(2)


def run_rows(workers, chosen, args):
    results = []
    for number, row in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {row.title}", flush=True)
        result = {"title": row.title, "ours": run_row(workers, row, args)}
        result["peers"] = [compared(result["ours"], row, peer) for peer in row.peers]
        del result["ours"]["others"]
        for line in report.row_lines(result):
            print("   ", line, flush=True)
        results.append(result)
    # Not in between, as workers are slow to start.
    workers.close()
    for row, result in zip(chosen, results):
        if row.memory and not args.no_memory:
            print(f"memory: {row.title}", flush=True)
            measure_memory(workers, row, result)
    return results, workers.about


def run_row(workers, row, args):
    """All of a row, in turn, round by round: the median of each round, ours and by (worker, case)."""
    ways = dict.fromkeys([(OURS, row.ours), *(way for peer in row.peers for way in peer.ways)])
    medians = {way: [] for way in ways}
    errors = {}
    for _ in range(args.rounds):
        for way in ways:
            if way in errors:
                continue
            seconds = workers.ask(*way)
            if isinstance(seconds, str):
                errors[way] = seconds
            else:
                medians[way].append(median(seconds))
    workers.forget()
    ours = outcome(row.ours, medians, errors, OURS)
    ours["others"] = {way: outcome(way[1], medians, errors, way[0]) for way in ways}
    return ours


def outcome(case, medians, errors, worker):
    way = (worker, case)
    if way in errors:
        return {"case": case, "worker": worker, "error": errors[way]}
    rounds = medians[way]
    return {"case": case, "worker": worker, "ms": 1e3 * median(rounds), "rounds_ms": [1e3 * s for s in rounds]}


def compared(ours, row, peer):
    """A peer's fastest way, and the ratio to ours round by round."""
    ways = [ours["others"][way] for way in peer.ways]
    done = [way for way in ways if "ms" in way]
    result = {"name": peer.name, "target": peer.target, "memory_target": peer.memory_target}
    if not done:
        return {**result, "error": "; ".join(way["error"] for way in ways)}
    best = min(done, key=lambda way: way["ms"])
    result |= best
    failed = {way["case"]: way["error"] for way in ways if "error" in way}
    if failed:
        result["ways_errors"] = failed
    result["ways_ms"] = {way["case"]: way["ms"] for way in done}
    if "ms" in ours:
        ratios = [theirs / mine for theirs, mine in zip(best["rounds_ms"], ours["rounds_ms"])]
        result |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


def measure_memory(workers, row, result):
    def put(outcome, memory):
        outcome["memory" if isinstance(memory, dict) else "memory_error"] = memory

    put(result["ours"], workers.memory(OURS, row.ours))
    result["ours"]["memory_limit"] = row.memory_limit
    for peer, outcome in zip(row.peers, result["peers"]):
        # A malloc that keeps what is freed says nothing of what is needed.
        if "case" in outcome and outcome["worker"] != TUNED:
            put(outcome, workers.memory(outcome["worker"], outcome["case"]))
        if row.title.startswith("train step") and outcome.get("worker") == PYTHON:
            outcome["outside_products"] = workers.outside_products(outcome["case"])


def run_curves(make_workers, args):
    results = []
    for curve in curves(args.quick):
        lines = [{"name": name, "points": []} for name, _, _ in curve.lines]
        workers = None
        for value in curve.values:
            print(f"{curve.axis} {value}", flush=True)
            if workers is None or curve.threads:
                if workers:
                    workers.close()
                workers = make_workers(value if curve.threads else args.threads)
            rounds = [[] for _ in lines]
            errors = {}
            for _ in range(args.rounds):
                for index, (_, worker, at) in enumerate(curve.lines):
                    seconds = workers.ask(worker, at(value))
                    if isinstance(seconds, str):
                        errors[index] = seconds
                    else:
                        rounds[index].append(1e3 * median(seconds))
            workers.forget()
            for index, line in enumerate(lines):
                point = {"value": value}
                if index in errors:
                    point["error"] = errors[index]
                else:
                    point |= {"ms": median(rounds[index]), "min": min(rounds[index]), "max": max(rounds[index])}
                line["points"].append(point)
        workers.close()
        results.append({"title": curve.title, "axis": curve.axis, "lines": lines})
    return results, workers.about


if __name__ == "__main__":
    main()
