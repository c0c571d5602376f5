"""Figures, ratios and verdicts: as a table, as JSON and as a plot."""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROWS: dict[str, str] = {
    "create": "names",
    "stat first": "look",
    "stat again": "look",
    "open+read first": "data",
    "open+read again": "data",
    "list first": "look",
    "list again": "look",
    "rename": "names",
    "unlink": "names",
    "seq write 1 MiB": "data",
    "seq rewrite 1 MiB": "data",
    "seq read 1 MiB first": "data",
    "seq read 1 MiB again": "data",
    "rand read 4 KiB first": "data",
    "rand read 4 KiB again": "data",
    "rand write 4 KiB": "data",
    "fstat, open file": "kept",
    "read 4 KiB, open file": "kept",
    "flock+unlock": "locks",
}
"""Each row's class, which decides its target: names are changed, looked at, data, or served by the kernel's cache. File
locks have none: on native XFS and passthroughfs they are the kernel's own."""

HAND_OVER_MS = 3.0
LOCK_HAND_OVER_MS = 2.0
SECOND_MOUNT_S = 1.5
LOCK_FROM_CACHE_US = 20.0
MEMORY_MIB = 200 * 1e6 / 2**20
HOME_TARGET = 0.8
NODE_TARGETS = {"names": 0.25, "data": 0.4}
KEPT_TARGET = 0.8
KERNEL_TARGET = 0.8

Samples = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Verdict:
    """One target: what is compared, the value reached, the value asked for."""

    name: str
    value: float
    target: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def word(self) -> str:
        return "ok" if self.met else "MISS"


@dataclass
class Figures:
    """All samples of one run; ``rates`` by column and row, ``hand_over`` likewise in ms."""

    rates: Samples
    hand_over: Samples
    lock_from_cache_us: float | None = None
    second_mount_s: list[float] = field(default_factory=list)
    memory: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    def median(self, column: str, row: str) -> float:
        """The median rate of a row."""
        return statistics.median(self.rates[column][row])

    def ratio(self, column: str, base: str, row: str) -> float:
        """How a column's median compares with that of *base*."""
        return self.median(column, row) / self.median(base, row)

    def hand_over_median(self, column: str, row: str) -> float:
        """The median of a hand-over row in ms."""
        return statistics.median(self.hand_over[column][row])

    def row_targets(self, row: str) -> dict[str, Verdict]:
        """The verdicts of one row, by column; a column without a target for it is absent."""
        kind = ROWS[row]
        if kind == "locks":
            return {}
        base = "native" if kind == "kept" else "passthrough"
        wanted = {"home": KEPT_TARGET if kind == "kept" else HOME_TARGET}
        if kind == "kept":
            wanted["node"] = KEPT_TARGET
        elif kind in NODE_TARGETS:
            wanted["node"] = NODE_TARGETS[kind]
        out = {}
        for column, target in wanted.items():
            if column in self.rates:
                out[column] = Verdict(f"{row}: {column} / {base}", self.ratio(column, base, row), target, True)
        if "kernel" in self.rates and row.startswith(("seq", "rand")):
            value = self.ratio("kernel", "native", row)
            out["kernel"] = Verdict(f"{row}: kernel / native", value, KERNEL_TARGET, True)
        return out

    def hand_over_verdict(self, row: str) -> Verdict:
        """The verdict of a hand-over row."""
        limit = LOCK_HAND_OVER_MS if row in ("hand-over locks", "hand-over to waiter") else HAND_OVER_MS
        return Verdict(f"{row}, median ms", self.hand_over_median("node", row), limit, False)

    def verdicts(self) -> list[Verdict]:
        """Every target that this run can judge."""
        out = [verdict for row in ROWS for verdict in self.row_targets(row).values()]
        for row in self.hand_over.get("node", {}):
            out.append(self.hand_over_verdict(row))
        if self.lock_from_cache_us is not None:
            out.append(Verdict("lock from cache, µs", self.lock_from_cache_us, LOCK_FROM_CACHE_US, False))
        if self.second_mount_s:
            out.append(Verdict("second mount, s", statistics.median(self.second_mount_s), SECOND_MOUNT_S, False))
        for node, processes in self.memory.items():
            total = sum(process["pss"] for process in processes.values())
            out.append(Verdict(f"memory of {node} with many cached inodes, MiB PSS", total, MEMORY_MIB, False))
        return out


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def table(figures: Figures, titles: dict[str, str]) -> str:
    """The figures as text: rates (a second), ratios to passthroughfs and native, and the targets."""
    keys = list(titles)
    head = f"{'row':<22} {'unit':<6}" + "".join(f"{titles[key]:>15}" for key in keys)
    ratios = [(column, base) for base in ("passthrough", "native") for column in keys if column not in (base, "native")]
    ratios = [(column, base) for column, base in ratios if column != "passthrough"]
    head += "".join(f"{column + '/' + base[:6]:>14}" for column, base in ratios) + "  targets"
    lines = [head, "-" * len(head)]
    for row in ROWS:
        unit = "MiB/s" if row.startswith("seq") else "ops/s"
        line = f"{row:<22} {unit:<6}" + "".join(f"{_figure(figures.median(key, row)):>15}" for key in keys)
        line += "".join(f"{figures.ratio(column, base, row):>14.2f}" for column, base in ratios)
        marks = [f"{column} ≥{v.target:g} {v.word}" for column, v in figures.row_targets(row).items()]
        lines.append(line + "  " + ", ".join(marks))
    for row in figures.hand_over.get("native", {}):
        line = f"{row:<22} {'ms':<6}" + "".join(f"{figures.hand_over_median(key, row):>15.3f}" for key in keys)
        verdict = figures.hand_over_verdict(row)
        lines.append(f"{line}{'':{14 * len(ratios)}}  node ≤{verdict.target:g} {verdict.word}")
    verdicts = figures.verdicts()
    for verdict in verdicts:
        if verdict.name.startswith(("lock", "second", "memory")):
            sign = "≥" if verdict.at_least else "≤"
            lines.append(f"{verdict.name}: {verdict.value:.2f} ({sign}{verdict.target:.1f} {verdict.word})")
    for node, processes in figures.memory.items():
        for name, sizes in processes.items():
            lines.append(f"  {node} {name}: RSS {sizes['rss']:.1f} MiB, PSS {sizes['pss']:.1f} MiB")
    missed = [verdict for verdict in verdicts if not verdict.met]
    lines.append(f"targets met: {len(verdicts) - len(missed)} of {len(verdicts)}")
    return "\n".join(lines)


def save_json(figures: Figures, path: Path) -> None:
    """Write every sample, the medians' verdicts and where it ran."""
    path.write_text(
        json.dumps(
            {
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "kernel": platform.release(),
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "parameters": figures.parameters,
                "rates": figures.rates,
                "hand_over_ms": figures.hand_over,
                "lock_from_cache_us": figures.lock_from_cache_us,
                "second_mount_s": figures.second_mount_s,
                "memory_mib": figures.memory,
                "verdicts": [
                    {"name": v.name, "value": v.value, "target": v.target, "at_least": v.at_least, "met": v.met}
                    for v in figures.verdicts()
                ],
            },
            indent=1,
        )
        + "\n"
    )


def save_plot(figures: Figures, titles: dict[str, str], path: Path) -> None:
    """Draw each row's rate relative to passthroughfs, with the spread of the repetitions, on a log scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(ROWS)
    canvas, axes = pyplot.subplots(figsize=(11, 0.5 * len(rows) + 2))
    keys = [key for key in titles if key != "passthrough"]
    height = 0.8 / len(keys)
    for place, key in enumerate(keys):
        middle = [figures.ratio(key, "passthrough", row) for row in rows]
        base = [figures.median("passthrough", row) for row in rows]
        low = [m - min(figures.rates[key][row]) / b for m, row, b in zip(middle, rows, base, strict=True)]
        high = [max(figures.rates[key][row]) / b - m for m, row, b in zip(middle, rows, base, strict=True)]
        at = [i + (place - (len(keys) - 1) / 2) * height for i in range(len(rows))]
        axes.barh(at, middle, height, xerr=[low, high], label=titles[key], error_kw={"linewidth": 0.8})
    axes.axvline(1.0, color="black", linewidth=1, label="passthroughfs")
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("rate relative to pyfuse3's passthroughfs (more is better); bars: median, lines: all repetitions")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(keys) + 1)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)
