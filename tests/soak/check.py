"""Looks at everything that ended generations left on the volume, through one node's mount.

``python -m tests.soak.check '{"mount": ..., ...}'`` prints a JSON object: ``wrong`` (what is not as it must be) and
``looked`` (how many things were compared). With ``settle`` what was found is from now on the only right answer; with
``remove`` the generations' folders are removed afterwards.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.soak import oracle
from tests.soak.load import STATIC_BLOCKS, static_path
from tests.soak.oracle import BLOCK, BLOCKS, FILES, LINES_AT, NAMES_AT, SLOTS, STATIC_AT, STATICS, Table, Window


class Check:
    """One look. *tables*: of the generations to look at, all of them ended."""

    def __init__(self, root: Path, tables: dict[str, Table], settle: bool) -> None:
        self.root = root
        self.tables = tables
        self.settle = settle
        self.wrong: list[str] = []
        self.looked = 0

    def _try(self, look: Callable[[], None]) -> None:
        self.looked += 1
        try:
            look()
        except oracle.Wrong as wrong:
            self.wrong.append(str(wrong))
        except OSError as failed:
            self.wrong.append(f"checking: {failed}")

    def run(self) -> None:
        """Look at all of it."""
        shared = self._listing(self.root / "shared")
        for generation, table in self.tables.items():
            for file in range(FILES):
                self._try(lambda g=generation, t=table, f=file: self._file(g, t, f))  # type: ignore[misc]
            names = self._listing(self.root / "g" / generation / "names")
            for slot in range(SLOTS):
                self._try(lambda g=generation, t=table, s=slot, n=names: self._slot(g, t, s, n | shared))  # type: ignore[misc]
            for cell in range(STATIC_AT, STATIC_AT + STATICS):
                self._try(lambda g=generation, t=table, c=cell: self._static(g, t, c))  # type: ignore[misc]
        self._logs()

    def _listing(self, folder: Path) -> frozenset[str]:
        """The names in a folder, as ``FOLDER/NAME``; a folder that is not there has none."""
        found: frozenset[str] = frozenset()
        with suppress(FileNotFoundError):
            found = frozenset(f"{folder.name}/{name}" for name in os.listdir(folder))
        return found

    def _keep(self, table: Table, cell: int, version: int) -> None:
        if self.settle:
            table.settle(cell, version)

    def _file(self, generation: str, table: Table, file: int) -> None:
        data = b""
        with suppress(FileNotFoundError):
            data = (self.root / "g" / generation / f"blocks{file}").read_bytes()
        for number in range(BLOCKS):
            cell = file * BLOCKS + number
            what = f"block {number} of blocks{file} of {generation}"
            window = Window.open(table, cell)
            version = oracle.version_of(data[number * BLOCK : (number + 1) * BLOCK], generation, cell, what)
            window.judge(table, cell, version, what)
            self._keep(table, cell, version)

    def _slot(self, generation: str, table: Table, slot: int, names: frozenset[str]) -> None:
        cell = NAMES_AT + slot
        window = Window.open(table, cell)
        mine = (f"names/s{slot}.", f"shared/{generation}.s{slot}.")
        found = frozenset(name for name in names if name.startswith(mine))
        low, high = window.low(table, cell), table.begun(cell)
        version = oracle.version_by_names(generation, slot, found, low, high, f"names of {generation}, slot {slot}")
        self._keep(table, cell, version)

    def _static(self, generation: str, table: Table, cell: int) -> None:
        """The newest version that was synced is there, unless the next one was begun."""
        version = table.synced(cell)
        if version == 0 or table.begun(cell) != version:
            return
        what = f"{static_path(self.root, generation, cell, version).name} of {generation}"
        data = static_path(self.root, generation, cell, version).read_bytes()
        if len(data) != STATIC_BLOCKS * BLOCK:
            raise oracle.Wrong(f"{what}: {len(data)} bytes")
        for at in range(STATIC_BLOCKS):
            found = oracle.version_of(data[at * BLOCK : (at + 1) * BLOCK], generation, cell, what)
            if found != version:
                raise oracle.Wrong(f"{what}: version {found} in block {at}")

    def _logs(self) -> None:
        numbers: dict[str, list[int]] = {generation: [] for generation in self.tables}
        folder = self.root / "logs"
        try:
            for log in sorted(os.listdir(folder), key=lambda name: int(name[3:])):
                for generation, number in oracle.parse_lines((folder / log).read_bytes(), log):
                    if generation in numbers:
                        numbers[generation].append(number)
        except (OSError, oracle.Wrong) as failed:
            self.wrong.append(f"checking the logs: {failed}")
            return
        for generation, found in numbers.items():
            self._try(lambda g=generation, n=found: self._lines(g, n))  # type: ignore[misc]

    def _lines(self, generation: str, found: list[int]) -> None:
        table = self.tables[generation]
        low, high = Window.open(table, LINES_AT).low(table, LINES_AT), table.begun(LINES_AT)
        oracle.check_lines(found, low, high, f"lines of {generation}")
        self._keep(table, LINES_AT, len(found))

    def remove(self) -> None:
        """Remove what the generations left; their lines stay in the logs."""
        for generation in self.tables:
            self._try(lambda g=generation: self._remove(g))  # type: ignore[misc]

    def _remove(self, generation: str) -> None:
        shared = self.root / "shared"
        for name in os.listdir(shared):
            if name.startswith(f"{generation}."):
                os.unlink(shared / name)
        top = self.root / "g" / generation
        if not top.exists():
            return
        for folder in (top / "names", top / "probe"):
            if folder.exists():
                for name in os.listdir(folder):
                    os.unlink(folder / name)
                os.rmdir(folder)
        for name in os.listdir(top):
            os.unlink(top / name)
        os.rmdir(top)


def main() -> int:
    """Run one check; its findings are for the caller to judge."""
    config: dict[str, Any] = json.loads(sys.argv[1])
    tables = {name: Table(Path(config["oracle"]) / name / "table") for name in config["generations"]}
    check = Check(Path(config["mount"]), tables, bool(config.get("settle")))
    if config.get("remove"):
        check.remove()
    else:
        check.run()
    print(json.dumps({"wrong": check.wrong, "looked": check.looked}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
