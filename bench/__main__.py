"""``python -m bench``: measure all columns in one run, print the table, write JSON and a plot."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import columns
from bench.columns import BenchError, Column, Setup
from bench.lockcost import lock_from_cache_us
from bench.report import Figures, save_json, save_plot, table

WORKER = Path(__file__).with_name("worker.py")
WORKER_TIMEOUT_S = 900.0
FULL = {"repeat": 5, "files": 2000, "mib": 128, "randoms": 4000, "repeats": 20_000, "turns": 300, "mounts": 3}
QUICK = {"repeat": 2, "files": 200, "mib": 16, "randoms": 400, "repeats": 4000, "turns": 60, "mounts": 1}
MEMORY_FILES = 100_000


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers: under a minute, for a smoke test")
    parser.add_argument("--self-test", action="store_true", help="no lab: plain folders stand in for the MXFS columns")
    parser.add_argument("--memory", action="store_true", help=f"also measure memory with {MEMORY_FILES} cached inodes")
    parser.add_argument("--repeat", type=int, help="interleaved repetitions of everything")
    parser.add_argument("--size", default="4G", help="size of the volumes (sparse)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"), help="folder for results")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser.parse_args()


def run_worker(config: dict[str, Any]) -> Any:
    """Run the worker once; its JSON reply, or BenchError with what it said."""
    argv = [sys.executable, "-I", str(WORKER), json.dumps(config)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=WORKER_TIMEOUT_S)
    if done.returncode != 0:
        raise BenchError(f"the worker failed in {config['roots']} ({config['part']}):\n{done.stderr}")
    return json.loads(done.stdout)


def turn(order: tuple[Column, ...], number: int) -> list[Column]:
    """The columns in an order of their own for each repetition, so that none is always first."""
    start = number % len(order)
    return [*order[start:], *order[:start]]


def measure(setup: Setup, parameters: dict[str, int]) -> Figures:
    """Measure every column, several times, interleaved."""
    figures = Figures(rates={c.key: {} for c in setup.columns}, hand_over={c.key: {} for c in setup.columns})
    figures.parameters = dict(parameters)
    for number in range(parameters["repeat"]):
        for part in ("names", "data", "hand-over"):
            for column in turn(setup.columns, number):
                print(f"repetition {number + 1} of {parameters['repeat']}: {part} on {column.title}", file=sys.stderr)
                config = {"part": part, "roots": [str(column.root), str(column.peer)], **parameters}
                reply = run_worker(config)
                if part == "hand-over":
                    for row, samples in reply.items():
                        figures.hand_over[column.key].setdefault(row, []).extend(samples)
                else:
                    for row, value in reply.items():
                        figures.rates[column.key].setdefault(row, []).append(value)
    return figures


def lab_figures(setup: Setup, figures: Figures, parameters: dict[str, int], memory: bool) -> None:
    """Add what only a lab can tell: the time of a mount, and the memory of each node's processes."""
    if setup.lab is None:
        return
    if memory:
        nodes = {"n1": setup.lab / "n1", "n2": setup.lab / "n2"}
        roots = [str(path) for path in nodes.values()]
        print(f"memory: {MEMORY_FILES} files cached on both nodes", file=sys.stderr)
        run_worker({"part": "populate", "roots": roots, "files": MEMORY_FILES})
        figures.memory = {node: columns.memory_mib(setup.lab, node) for node in nodes}
    figures.second_mount_s = [columns.second_mount_s(setup.lab) for _ in range(parameters["mounts"])]


def main() -> int:
    """Run the benchmark; 0, or 1 when it failed (with --strict: when a target is missed)."""
    options = arguments()
    parameters = dict(QUICK if options.quick else FULL)
    if options.repeat:
        parameters["repeat"] = options.repeat
    options.out.mkdir(parents=True, exist_ok=True)
    # A dot name: linters and type checkers leave the unpacked package alone.
    try:
        with columns.everything(options.out / ".sdist", options.size, not options.self_test) as setup:
            figures = measure(setup, parameters)
            figures.lock_from_cache_us = lock_from_cache_us()
            lab_figures(setup, figures, parameters, options.memory)
            titles = {column.key: column.title for column in setup.columns}
    except (BenchError, subprocess.TimeoutExpired) as failed:
        print(f"bench: {failed}", file=sys.stderr)
        return 1
    figures.parameters["self_test"] = options.self_test
    print(table(figures, titles))
    name = "self-test" if options.self_test else "bench"
    kept = options.out / f"{name}.json", options.out / f"{name}.png"
    save_json(figures, kept[0])
    save_plot(figures, titles, kept[1])
    print(f"written: {kept[0]}, {kept[1]}")
    return int(options.strict and any(not verdict.met for verdict in figures.verdicts()))


if __name__ == "__main__":
    sys.exit(main())
