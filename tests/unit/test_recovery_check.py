"""bench.recovery's comparison of a volume with what programs were answered: what counts as lost, and what does not."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.recovery import Run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run without a lab."""
    made = Run.__new__(Run)
    made.errors = []
    return made


def lost(run: Run, folder: Path, done: list[str], there: dict[str, Any], *, dead: bool) -> list[str]:
    """Return the errors where a program was answered for *done*, and the volume has the files *there*."""
    log, root = folder / "n2-0.log", folder / "root"
    log.write_text("".join(f"1.0 0.1 {line}\n" for line in [*done, "read 7"]))
    (root / "n2-1").mkdir(parents=True)
    for name, content in there.items():
        (root / "n2-1" / name).write_text(json.dumps(content))
    assert run.check_log(log, root, dead) == len(done) + 1
    return run.errors


MADE = ["mkdir n2-1", "create n2-1/w3", "fsync n2-1/w3", "rename n2-1/w3 n2-1/r3"]
GOOD = [2, 3]


@pytest.mark.parametrize("dead", [False, True])
def test_everything_is_there(run: Run, tmp_path: Path, dead: bool) -> None:
    assert lost(run, tmp_path, [*MADE, "create n2-1/w4"], {"r3": GOOD, "w4": None}, dead=dead) == []


@pytest.mark.parametrize("dead", [False, True])
def test_a_fsynced_file_without_any_name_is_lost(run: Run, tmp_path: Path, dead: bool) -> None:
    assert len(lost(run, tmp_path, [*MADE, "create n2-1/w4"], {"w4": None}, dead=dead)) == 1


def test_a_rename_of_a_node_that_lives_on_is_kept(run: Run, tmp_path: Path) -> None:
    assert len(lost(run, tmp_path, [*MADE, "create n2-1/w4"], {"w3": GOOD, "w4": None}, dead=False)) == 1


def test_a_rename_may_die_with_its_node_but_not_with_the_content(run: Run, tmp_path: Path) -> None:
    assert lost(run, tmp_path, [*MADE, "create n2-1/w4"], {"w3": GOOD}, dead=True) == []


def test_the_content_under_the_old_name_counts(run: Run, tmp_path: Path) -> None:
    assert len(lost(run, tmp_path, [*MADE, "create n2-1/w4"], {"w3": None}, dead=True)) == 1


def test_a_later_fsync_makes_the_rename_durable(run: Run, tmp_path: Path) -> None:
    done = [*MADE, "create n2-1/w4", "fsync n2-1/w4", "create n2-1/w5"]
    assert len(lost(run, tmp_path, done, {"w3": GOOD, "w4": [2, 4]}, dead=True)) == 1
