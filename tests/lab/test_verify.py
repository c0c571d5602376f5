"""fio writes blocks that say what they are, and reads them again: on the home, on a node, and on another node."""

import subprocess
from pathlib import Path

import pytest
from labkit import Lab, must

from mxfsd import procs

pytestmark = pytest.mark.needs("fio")
Work = dict[str, Path]
PAIRS = ["home-node", "node-home", "node-node"]
SIZE = 8 << 20
ENGINES = {
    "psync": ["--ioengine=psync"],
    "threads": ["--ioengine=psync", "--numjobs=3", "--thread", "--offset_increment=8m"],
    "direct": ["--ioengine=libaio", "--iodepth=16", "--direct=1"],
    "vectored": ["--ioengine=pvsync2"],
    "mmap": ["--ioengine=mmap"],
    "synced": ["--ioengine=psync", "--fsync=64"],
}
CHECKS = {
    "crc32c": ["--verify=crc32c"],
    "sha256": ["--verify=sha256", "--verify_interval=1024"],
    "meta": ["--verify=crc32c", "--verify_pattern=0xdeadbeef"],
    "pattern": ["--verify=pattern", '--verify_pattern="mxfs"%o'],
    "backlog": ["--verify=xxhash", "--verify_backlog=128", "--verify_backlog_batch=32"],
}
SHAPES = {
    "random": ["--rw=randwrite", "--bs=4k"],
    "uneven": ["--rw=randwrite", "--bsrange=1k-64k", "--bs_unaligned"],
    "mixed": ["--rw=randrw", "--bs=8k"],
    "large": ["--rw=write", "--bs=1m"],
}
ROWS = [
    ("psync", "crc32c", "random"),
    ("psync", "sha256", "uneven"),
    ("threads", "meta", "random"),
    ("direct", "crc32c", "random"),
    ("direct", "pattern", "large"),
    ("vectored", "meta", "mixed"),
    ("mmap", "crc32c", "random"),
    ("mmap", "backlog", "random"),
    ("synced", "backlog", "mixed"),
]


def pair(lab: Lab, which: str) -> tuple[str, str]:
    """Who writes, who reads afterwards."""
    home, (first, second) = lab.home(), lab.others()
    return {"home-node": (home, first), "node-home": (first, home), "node-node": (first, second)}[which]


def fio(path: Path, *more: str) -> list[str]:
    state = ["--verify_state_save=0", "--verify_fatal=1", "--randrepeat=1", "--randseed=7"]
    return ["fio", "--name=verify", f"--filename={path}", f"--size={SIZE}", "--output-format=terse", *state, *more]


@pytest.mark.parametrize("which", PAIRS)
@pytest.mark.parametrize(("engine", "check", "shape"), ROWS, ids=lambda word: word)
def test_what_fio_wrote_is_there(lab: Lab, work: Work, which: str, engine: str, check: str, shape: str) -> None:
    """Verified where it was written, at once, and then on the other node: with and without its page cache."""
    writer, reader = pair(lab, which)
    job = [*ENGINES[engine], *CHECKS[check], *SHAPES[shape]]
    must(fio(work[writer] / "f", *job, "--do_verify=1"))
    for more in ([], ["--direct=1", "--ioengine=psync"]):
        must(fio(work[reader] / "f", *job, *more, "--verify_only"))


def test_a_wrong_block_is_found(lab: Lab, work: Work) -> None:
    """What makes the tests above worth something."""
    writer, reader = pair(lab, "node-home")
    job = [*ENGINES["psync"], *CHECKS["crc32c"], *SHAPES["random"]]
    must(fio(work[writer] / "f", *job))
    with open(work[writer] / "f", "r+b") as stream:
        stream.seek(5 * 4096 + 100)
        stream.write(b"x")
    found = subprocess.run(fio(work[reader] / "f", *job, "--verify_only"), capture_output=True, text=True)
    assert found.returncode != 0 and "crc32c: verify failed" in found.stderr + found.stdout


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.needs_lab
def test_what_fio_wrote_outlives_the_home(lab: Lab, work: Work, synced: bool) -> None:
    """The home dies while a node writes: fio sees no error, and every block is there on both survivors."""
    home, (writer, reader) = lab.home(), lab.others()
    job = [*ENGINES["synced" if synced else "psync"], *CHECKS["crc32c"], *SHAPES["random"], "--loops=4"]
    started = subprocess.Popen(
        fio(work[writer] / "f", *job, "--do_verify=1", "--rate_iops=1500"), stdout=subprocess.PIPE, text=True
    )
    try:
        path = work[reader] / "f"
        assert procs.wait_until(lambda: path.exists() and path.stat().st_blocks * 512 > SIZE // 4, 60)
        assert started.poll() is None, "it ended before the home could die"
        lab.kill(home)
        assert started.wait(120) == 0
    finally:
        started.kill()
        started.communicate()
    for node in (reader, writer):
        must(fio(work[node] / "f", *job, "--verify_only"))
    lab.start(home)
    must(fio(work[home] / "f", *job, "--verify_only"))


@pytest.mark.parametrize("which", PAIRS)
def test_two_fio_write_one_file(lab: Lab, work: Work, which: str) -> None:
    """Each half of one file from its own node, at once: both verify both."""
    nodes = pair(lab, which)
    halves = [f"--offset={number * (SIZE // 2)}" for number in range(2)]
    job = [f"--size={SIZE // 2}", *CHECKS["crc32c"], *SHAPES["random"], "--ioengine=psync"]
    with open(work[nodes[0]] / "f", "wb") as stream:
        stream.truncate(SIZE)
    started = [
        subprocess.Popen(fio(work[node] / "f", *job, half, "--do_verify=1"), stdout=subprocess.PIPE)
        for node, half in zip(nodes, halves, strict=True)
    ]
    for one in started:
        one.communicate(timeout=120)
    assert [one.returncode for one in started] == [0, 0]
    for node in nodes:
        for half in halves:
            must(fio(work[node] / "f", *job, half, "--verify_only"))
