"""Random operations through random nodes, checked step by step against a model and against native XFS.

A failure prints its seed, the operations that led to it (shrunk) and how to run it again:
``MXFS_MODEL_SEED=N pytest tests/lab/test_model.py``; MXFS_MODEL_STEPS and MXFS_MODEL_RUNS change the size.
"""

import os
from pathlib import Path

import pytest
from labkit import Lab
from modelrun import Generator, Mismatch, Op, Run, shrink

STEPS = int(os.environ.get("MXFS_MODEL_STEPS", "400"))
RUNS = int(os.environ.get("MXFS_MODEL_RUNS", "10"))
SHRINK_S = 30.0


def seeds() -> list[int]:
    """The seeds of this session."""
    chosen = os.environ.get("MXFS_MODEL_SEED")
    return [int(chosen)] if chosen else list(range(1, RUNS + 1))


class Folders:
    """Makes a fresh pair of folders (on the lab, on native XFS) for each run."""

    def __init__(self, lab: Lab, native: Path, prefix: str) -> None:
        self.lab, self.native, self.prefix, self.made = lab, native, prefix, 0

    def run(self) -> Run:
        """Start a run in new folders."""
        self.made += 1
        name = f"{self.prefix}-{self.made}"
        for parent in (self.lab["n1"], self.native):
            os.mkdir(parent / name)
            os.chmod(parent / name, 0o755)
        return Run({node: root / name for node, root in self.lab.nodes.items()}, self.native / name)

    def replay(self, ops: list[Op]) -> str | None:
        """Run *ops* afresh; the mismatch's text, or None when all agree."""
        run = self.run()
        try:
            for op in ops:
                run.step(op)
            run.finish()
        except Mismatch as found:
            return str(found)
        finally:
            run.close()
        return None


def report(folders: Folders, seed: int, ops: list[Op], found: str) -> str:
    """Shrink the failing operations and tell the reader everything needed to see it again."""
    short = shrink(ops, lambda some: folders.replay(some) is not None, SHRINK_S)
    lines = [
        f"seed {seed}, step {len(ops)}: {found}",
        f"replay: MXFS_MODEL_SEED={seed} pytest tests/lab/test_model.py",
        f"shrunk from {len(ops)} to {len(short)} operations; these end with: {folders.replay(short)}",
        *(f"  {op}" for op in short[-60:]),
    ]
    return "\n".join(lines)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", seeds())
def test_random_operations_agree_with_the_model(lab: Lab, native_xfs: Path, seed: int) -> None:
    folders = Folders(lab, native_xfs, f"model-{seed}")
    generator = Generator(seed, lab.names)
    run = folders.run()
    ops: list[Op] = []
    umask = os.umask(0o022)
    try:
        try:
            while len(ops) < STEPS:
                op = generator.next(run.model)
                ops.append(op)
                run.step(op)
                if len(ops) % 100 == 0:
                    run.finish()
            run.finish()
        except Mismatch as found:
            run.close()
            pytest.fail(report(folders, seed, ops, str(found)), pytrace=False)
    finally:
        run.close()
        os.umask(umask)


def test_the_tester_notices_a_lost_write(lab: Lab, native_xfs: Path) -> None:
    folders = Folders(lab, native_xfs, "model-lost")
    ops = [Op("n1", "create", (b"a", True, 0o644)), Op("n1", "write", (b"a", 0, b"12345"))]
    run = folders.run()
    try:
        for op in ops:
            assert run.step(op)
        run.finish()
        # Behind the model's back, as a lost update would.
        (run.nodes["n1"] / "a").write_bytes(b"12x45")
        with pytest.raises(Mismatch, match="first difference at byte 2"):
            run.finish()
        with pytest.raises(Mismatch, match="expected ok b'12345'"):
            run.step(Op("n3", "read", (b"a", 0, 100)))
    finally:
        run.close()


def test_shrinking_keeps_only_what_fails() -> None:
    ops = [Op("n1", "mkdir", (b"%d" % i, 0o755)) for i in range(100)]
    needed = {ops[13], ops[77]}
    short = shrink(list(ops), lambda some: needed <= set(some), 10.0)
    assert short == [ops[13], ops[77]]
