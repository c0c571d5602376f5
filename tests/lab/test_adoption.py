"""mxfs adopt: an XFS with files becomes a volume of two nodes, and plain XFS again."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from labkit import must, run, running_lab, scratch_dir

from mxfsd import info
from mxfsd.lab import disk

pytestmark = pytest.mark.needs_lab
MIB = 1 << 20
XFS, GROWN = 512 * MIB, 528 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the lab is going to be, with an XFS in disk.img."""
    made = scratch_dir("mxfs-adopt-")
    disk.make_image(made / "disk.img", XFS)
    must(["mkfs.xfs", "-q", "-L", "old", made / "disk.img"])
    yield made
    shutil.rmtree(made)  # kept where the test failed


@contextmanager
def attached(image: Path) -> Iterator[str]:
    loop = disk.attach(image)
    try:
        yield loop
    finally:
        disk.detach(loop, image)


@contextmanager
def plain_mount(image: Path) -> Iterator[Path]:
    with attached(image) as loop:
        where = image.parent / "plain"
        where.mkdir()
        must(["mount", "-t", "xfs", loop, where])
        try:
            yield where
        finally:
            must(["umount", where])
            where.rmdir()


def adopt(image: Path) -> "subprocess.CompletedProcess[str]":
    with attached(image) as loop:
        return run([sys.executable, "-m", "mxfsd.cli.mxfs", "adopt", loop])


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """What is below a folder, all that a program can see of it but for atime and ctime."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.split("/")[0] == ".mxfs":
            continue
        st = path.lstat()
        data = ""
        if stat.S_ISREG(st.st_mode):
            data = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(st.st_mode):
            data = os.readlink(path)
        names = os.listxattr(path, follow_symlinks=False)
        attributes = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names]
        found[name] = (*st[:2], *st[3:7], st.st_mtime_ns, data, attributes)
    return found


def fill(root: Path) -> None:
    """Files of every kind, and a folder that is no longer a short one."""
    for number in range(300):
        (root / f"many/{number % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"many/{number % 3}/file{number}").write_text(str(number))
    (root / "large").write_bytes(os.urandom(20 * MIB))
    with open(root / "sparse", "wb") as file:
        file.truncate(1 << 30)
        file.seek(700 * MIB)
        file.write(b"x")
    os.link(root / "large", root / "other name")
    os.symlink("large", root / "link")
    os.mkfifo(root / "fifo", 0o640)
    os.chown(root / "sparse", 1234, 5678)
    os.setxattr(root / "many", "user.note", b"old")
    (root / "sub").mkdir(mode=0o2775)


def digest(image: Path) -> str:
    """Of the XFS."""
    done = hashlib.sha256()
    with open(image, "rb") as file:
        for _ in range(XFS // MIB):
            done.update(file.read(MIB))
    return done.hexdigest()


@pytest.mark.timeout(240)
def test_an_xfs_becomes_a_volume_and_plain_again(folder: Path) -> None:
    image = folder / "disk.img"
    with plain_mount(image) as root:
        fill(root)
        files = tree(root)
    assert len(files) > 300
    refused = adopt(image)
    assert refused.returncode == 1 and "enlarge the device by 16 MiB" in refused.stderr, refused.stderr
    os.truncate(image, GROWN)
    before = digest(image)
    done = adopt(image)
    assert (done.returncode, done.stderr) == (0, "") and "(old), XFS 512 MiB, lockspace 16 MiB" in done.stdout
    assert digest(image) == before
    with running_lab(2, folder=folder) as lab:
        assert tree(lab["n1"]) == tree(lab["n2"]) == files
        home, other = lab.home(), lab.others()[0]
        for name in (home, other):
            (lab[name] / f"many/0/of {name}").write_text(name)
            with open(lab[name] / "many/0/file0", "a") as file:
                file.write(name)
        os.unlink(lab[other] / "many/1/file1")
        os.rename(lab[other] / "sub", lab[other] / "many/sub")
        for name in (home, other):
            assert (lab[name] / "many/0/file0").read_text() == "0" + home + other
            assert not (lab[name] / "many/1/file1").exists() and (lab[name] / "many/sub").is_dir()
        lab.kill(home)
        (lab[other] / "after").write_text("the takeover")
        now = tree(lab[other])
        assert {name: now[name] for name in files.keys() & {"large", "sparse", "link"}} == {
            name: files[name] for name in ("large", "sparse", "link")
        }
    # It is an XFS still, with what the nodes made of it; and this is how it becomes one for good.
    known = info.info(str(image))
    with plain_mount(image) as root:
        assert tree(root) == now
        shutil.rmtree(root / ".mxfs")
    with attached(image) as loop:
        where = ["--offset", str(known["lockspace_offset"]), "--length", str(known["lockspace_bytes"])]
        must(["blkdiscard", "--zeroout", *where, loop])
    asked = run([sys.executable, "-m", "mxfsd.cli.mxfs", "info", image])
    assert asked.returncode == 1 and "no MXFS volume" in asked.stderr
    assert adopt(image).returncode == 0
    again = json.loads(must([sys.executable, "-m", "mxfsd.cli.mxfs", "info", "--json", image]).stdout)
    assert (again["uuid"], again["epoch"], again["slots"]) == (known["uuid"], 0, [])
    assert disk.check(image) == ""
