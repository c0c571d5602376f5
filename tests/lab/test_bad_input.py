"""What mkfs.mxfs and mount.mxfs refuse: one clear line, a non-zero exit, and not one byte of the device changed."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import Lab, missing_capability, must, mxfs_command, run, scratch_dir

pytestmark = pytest.mark.needs_lab
UID = 12_345
LOCKSPACE = 16 << 20
RECORD = 4096
MIB = 1 << 20


class Disk:
    """A loop device over a sparse image."""

    def __init__(self, folder: Path, name: str, size: str = "400M", read_only: bool = False) -> None:
        self.image = folder / f"{name}.img"
        if not self.image.exists():
            must(["truncate", "-s", size, self.image])
        options = ["--read-only"] if read_only else []
        self.loop = must(["losetup", "--find", "--show", *options, self.image]).stdout.strip()
        self._closed = False

    @property
    def size(self) -> int:
        return self.image.stat().st_size

    def fingerprint(self) -> str:
        """A digest of the size and of every data extent that is not all zeros, read from the device."""
        digest = hashlib.sha256(b"%d" % self.size)
        must(["blockdev", "--flushbufs", self.loop])
        with open(self.loop, "rb", buffering=0) as stream:
            at = 0
            while piece := stream.read(4 * MIB):
                if piece.count(0) != len(piece):
                    digest.update(b"%d" % at)
                    digest.update(piece)
                at += len(piece)
        return digest.hexdigest()

    def patch(self, offset: int, data: bytes) -> None:
        """Overwrite bytes of the device; a negative offset counts from its end."""
        with open(self.loop, "r+b", buffering=0) as stream:
            stream.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            stream.write(data)
            os.fsync(stream.fileno())

    def tail(self, size: int) -> bytes:
        """Return the last *size* bytes of the device."""
        with open(self.loop, "rb", buffering=0) as stream:
            stream.seek(-size, os.SEEK_END)
            return stream.read(size)

    def format(self) -> "Disk":
        """Make it an MXFS volume."""
        must([mxfs_command("mkfs.mxfs"), self.loop])
        return self

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            run(["losetup", "-d", self.loop])


class Bench:
    """A folder with disks, a mount point and a run root; everything is taken away in the end."""

    def __init__(self) -> None:
        self.folder = scratch_dir("mxfs-bad-")
        self.mountpoint = self.folder / "mnt"
        self.mountpoint.mkdir()
        self.run_root = self.folder / "run"
        self.disks: list[Disk] = []

    def disk(self, name: str = "disk", size: str = "400M", read_only: bool = False) -> Disk:
        self.disks.append(Disk(self.folder, name, size, read_only))
        return self.disks[-1]

    def mount(
        self, spec: str | Path, mountpoint: Path | None = None, options: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run mount.mxfs as mount(8) would."""
        words = f"state={self.run_root},timeouts=fast" + (f",{options}" if options else "")
        return run([mxfs_command("mount.mxfs"), spec, mountpoint or self.mountpoint, "-o", words], timeout_s=60)

    def left_behind(self) -> list[str]:
        """Mounts, processes and sockets that a refused mount must not leave."""
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.folder) in line]
        sockets = [str(path) for path in self.run_root.rglob("*.sock")] if self.run_root.exists() else []
        processes = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes()
            except OSError:
                continue
            if any(disk.loop.encode() in command.split(b"\0") for disk in self.disks) and b"mxfs" in command:
                processes.append(f"{entry.parent.name}: {command!r}")
        return mounts + sockets + processes

    def close(self) -> None:
        run(["umount", self.mountpoint])
        for disk in self.disks:
            disk.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def bench() -> Iterator[Bench]:
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    made = Bench()
    try:
        yield made
    finally:
        made.close()


def refused(done: subprocess.CompletedProcess[str], *patterns: str) -> None:
    """The command failed with one line on stderr that matches every pattern, and no traceback."""
    assert done.returncode != 0, f"accepted: {done.stdout}"
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for pattern in patterns:
        assert re.search(pattern, lines[0], re.IGNORECASE), f"{pattern!r} not in {lines[0]!r}"


def mkfs(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    return run([mxfs_command("mkfs.mxfs"), *argv], timeout_s=60)


# --- mkfs.mxfs -----------------------------------------------------------------------------------------------------


def test_mkfs_formats_a_blank_device_and_info_reads_it(bench: Bench) -> None:
    disk = bench.disk()
    assert mkfs("-L", "shared", disk.loop).returncode == 0
    told = must([mxfs_command("mxfs"), "info", disk.loop]).stdout
    uuid = must(["blkid", "-p", "-o", "value", "-s", "UUID", disk.loop]).stdout.strip()
    assert uuid in told
    assert "shared" in told
    must(["xfs_repair", "-n", disk.loop])


@pytest.mark.parametrize(
    ("tool", "named"),
    [(["mkfs.xfs", "-q", "-f"], "xfs"), (["mkfs.ext4", "-q", "-F"], "ext4"), (["mkswap"], "swap")],
    ids=["xfs", "ext4", "swap"],
)
def test_mkfs_refuses_what_holds_something(bench: Bench, tool: list[str], named: str) -> None:
    disk = bench.disk()
    must([*tool, disk.loop])
    before = disk.fingerprint()
    refused(mkfs(disk.loop), re.escape(disk.loop), named, "-f")
    assert disk.fingerprint() == before
    assert mkfs("-f", disk.loop).returncode == 0


def test_mkfs_refuses_an_mxfs_volume_without_force(bench: Bench) -> None:
    disk = bench.disk().format()
    before = disk.fingerprint()
    refused(mkfs(disk.loop), re.escape(disk.loop), "-f")
    assert disk.fingerprint() == before
    uuid = must(["blkid", "-p", "-o", "value", "-s", "UUID", disk.loop]).stdout
    assert mkfs("-f", disk.loop).returncode == 0
    assert must(["blkid", "-p", "-o", "value", "-s", "UUID", disk.loop]).stdout != uuid


def test_mkfs_refuses_a_partition_table(bench: Bench) -> None:
    disk = bench.disk()
    # A DOS table with one Linux partition: status, CHS, type 0x83, CHS, first sector, sectors; then the signature.
    disk.patch(446, bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (100_000).to_bytes(4, "little"))
    disk.patch(510, b"\x55\xaa")
    before = disk.fingerprint()
    refused(mkfs(disk.loop), re.escape(disk.loop), "partition|dos")
    assert disk.fingerprint() == before


@pytest.mark.parametrize("force", [[], ["-f"]], ids=["plain", "force"])
def test_mkfs_refuses_a_mounted_device_even_with_force(bench: Bench, force: list[str]) -> None:
    disk = bench.disk()
    must(["mkfs.xfs", "-q", disk.loop])
    must(["mount", "-t", "xfs", "-o", "ro", disk.loop, bench.mountpoint])
    before = disk.fingerprint()
    refused(mkfs(*force, disk.loop), re.escape(disk.loop), "mounted|in use|busy")
    assert disk.fingerprint() == before
    must(["umount", bench.mountpoint])


def test_mkfs_refuses_a_small_device(bench: Bench) -> None:
    disk = bench.disk(size="200M")
    before = disk.fingerprint()
    refused(mkfs(disk.loop), re.escape(disk.loop), "small|at least")
    assert disk.fingerprint() == before


def test_mkfs_refuses_a_read_only_device(bench: Bench) -> None:
    disk = bench.disk(read_only=True)
    before = disk.fingerprint()
    refused(mkfs("-f", disk.loop), re.escape(disk.loop), "read-only")
    assert disk.fingerprint() == before


def test_mkfs_refuses_what_is_no_block_device(bench: Bench) -> None:
    image = bench.disk().image
    before = image.read_bytes()
    for wrong in (image, bench.folder, bench.folder / "absent", Path("/dev/null")):
        refused(mkfs("-f", wrong), re.escape(str(wrong)))
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [["-L", "label-of-thirteen"], ["--lockspace-size", "potato"], ["--lockspace-size", "1"], ["--bogus"]],
    ids=["label", "size", "too-small-lockspace", "option"],
)
def test_mkfs_refuses_bad_options(bench: Bench, words: list[str]) -> None:
    disk = bench.disk()
    before = disk.fingerprint()
    done = mkfs(*words, disk.loop)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    assert disk.fingerprint() == before


def test_mkfs_passes_on_the_refusal_of_mkfs_xfs(bench: Bench) -> None:
    disk = bench.disk()
    before = disk.fingerprint()
    done = mkfs(disk.loop, "--", "-i", "size=77")
    assert done.returncode != 0
    assert "77" in done.stderr
    assert disk.fingerprint() == before


# --- mount.mxfs ----------------------------------------------------------------------------------------------------


def test_mount_refuses_other_contents(bench: Bench) -> None:
    """Blank, plain XFS, ext4: each is named, with the way out."""
    disk = bench.disk()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "mkfs.mxfs")
    must(["mkfs.ext4", "-q", "-F", disk.loop])
    before = disk.fingerprint()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "ext4|not an MXFS")
    must(["mkfs.xfs", "-q", "-f", disk.loop])
    plain = disk.fingerprint()
    assert plain != before
    refused(bench.mount(disk.loop), re.escape(disk.loop), "mount -t xfs|mkfs.mxfs")
    assert disk.fingerprint() == plain
    assert bench.left_behind() == []


def test_mount_refuses_the_wrong_thing(bench: Bench) -> None:
    disk = bench.disk().format()
    before = disk.fingerprint()
    for wrong in (bench.folder / "absent", disk.image, bench.folder, Path("/dev/null")):
        refused(bench.mount(wrong), re.escape(str(wrong)))
    refused(bench.mount("UUID=01234567-89ab-cdef-0123-456789abcdef"), "01234567-89ab")
    refused(bench.mount("LABEL=nobody"), "nobody")
    for wrong in (bench.folder / "nowhere", disk.image):
        refused(bench.mount(disk.loop, wrong), re.escape(str(wrong)))
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("bogus", "bogus"),
        ("bogus=1", "bogus"),
        ("timeouts=silly", "silly"),
        ("port=99999", "port"),
        ("port=x", "port"),
        ("multicast=10.0.0.1", "multicast"),
        ("peer=not-an-address!", "peer"),
        ("iface=", "iface"),
    ],
)
def test_mount_refuses_unknown_and_bad_options(bench: Bench, options: str, named: str) -> None:
    disk = bench.disk().format()
    before = disk.fingerprint()
    refused(bench.mount(disk.loop, options=options), named)
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_a_foreign_lockspace(bench: Bench) -> None:
    """The tail of another volume behind this XFS: the two do not belong together."""
    disk, other = bench.disk("disk").format(), bench.disk("other").format()
    disk.patch(-LOCKSPACE, other.tail(LOCKSPACE))
    before = disk.fingerprint()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "volume|uuid|foreign|belong")
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_a_lockspace_with_no_whole_header(bench: Bench) -> None:
    disk = bench.disk().format()
    for offset in (-LOCKSPACE + 100, -RECORD + 100):
        disk.patch(offset, b"\xa5" * 50)
    before = disk.fingerprint()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "torn|damaged|checksum|header|lockspace")
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_another_version_of_the_format(bench: Bench) -> None:
    """A version from the future is not guessed at: both headers say 99."""
    disk = bench.disk().format()
    for start in (-LOCKSPACE, -RECORD):
        record = bytearray(disk.tail(-start)[:RECORD])
        magic = record.find(b"MXFS")
        assert magic >= 0, "a header starts with its magic"
        at = magic + 8
        record[at : at + 2] = (99).to_bytes(2, "little")
        record[44:48] = zlib.crc32(record[:44]).to_bytes(4, "little")
        disk.patch(start, bytes(record))
    before = disk.fingerprint()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "version")
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_a_volume_that_shrank(bench: Bench) -> None:
    """An image cut short has lost its lockspace, whose records lie at the end."""
    disk = bench.disk().format()
    disk.close()
    must(["truncate", "-s", str(disk.size - 8 * MIB), disk.image])
    cut = bench.disk()
    before = cut.fingerprint()
    refused(bench.mount(cut.loop), re.escape(cut.loop))
    assert cut.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_a_read_only_device(bench: Bench) -> None:
    bench.disk().format().close()
    disk = bench.disk(read_only=True)
    before = disk.fingerprint()
    refused(bench.mount(disk.loop), re.escape(disk.loop), "read-only")
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


def test_mount_refuses_a_device_whose_xfs_is_mounted_by_hand(bench: Bench) -> None:
    disk = bench.disk().format()
    elsewhere = bench.folder / "by-hand"
    elsewhere.mkdir()
    must(["mount", "-t", "xfs", disk.loop, elsewhere])
    try:
        refused(bench.mount(disk.loop), re.escape(disk.loop), "mounted|in use|busy")
    finally:
        must(["umount", elsewhere])
    assert bench.left_behind() == []


def test_mount_refuses_what_is_mounted_already_and_the_first_goes_on(bench: Bench) -> None:
    disk = bench.disk().format()
    done = bench.mount(disk.loop)
    assert done.returncode == 0, done.stderr
    (bench.mountpoint / "f").write_text("first")
    second = bench.folder / "second"
    second.mkdir()
    refused(bench.mount(disk.loop, second), re.escape(disk.loop), "mounted|in use")
    refused(bench.mount(disk.loop), "mounted|in use")
    # Formatting it is refused too, force or not: a node uses it.
    refused(mkfs("-f", disk.loop), re.escape(disk.loop), "mounted|in use|busy")
    assert (bench.mountpoint / "f").read_text() == "first"
    must(["umount", bench.mountpoint])
    # umount(8) returns when the kernel has let go; the daemon frees the lease and leaves after that.
    deadline = time.monotonic() + 20
    while bench.left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bench.left_behind() == []
    must(["xfs_repair", "-n", disk.loop])


# --- not root ------------------------------------------------------------------------------------------------------


def as_other_user(module: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Call ``module.main()`` as uid UID, in a forked child: that uid may not reach the interpreter's files."""
    child_code = f"""
import os, sys, {module}
sys.argv = {argv!r}
os.setgroups([]); os.setresgid({UID}, {UID}, {UID}); os.setresuid({UID}, {UID}, {UID})
sys.exit({module}.main())
"""
    return run([sys.executable, "-c", child_code], timeout_s=60)


@pytest.mark.parametrize("module", ["mxfsd.cli.mkfs", "mxfsd.cli.mount"])
def test_others_than_root_are_refused(bench: Bench, module: str) -> None:
    disk = bench.disk()
    if module.endswith("mount"):
        disk.format()
    before = disk.fingerprint()
    name = {"mxfsd.cli.mkfs": "mkfs.mxfs", "mxfsd.cli.mount": "mount.mxfs"}[module]
    refused(as_other_user(module, [name, disk.loop, str(bench.mountpoint)][: 2 + module.endswith("mount")]), "root")
    assert disk.fingerprint() == before
    assert bench.left_behind() == []


# --- a running cluster ---------------------------------------------------------------------------------------------


def test_lab_volume_cannot_be_formatted_from_another_loop_device(lab: Lab) -> None:
    """A second loop device over the shared disk is what another host would see: its nodes' slots give it away."""
    loop = must(["losetup", "--find", "--show", lab.folder / "disk.img"]).stdout.strip()
    try:
        for force in ([], ["-f"]):
            refused(mkfs(*force, loop), re.escape(loop), "in use|node|mounted")
    finally:
        must(["losetup", "-d", loop])
    (lab["n2"] / "still").write_text("here")
    assert (lab["n3"] / "still").read_text() == "here"
