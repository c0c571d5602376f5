"""mount.mxfs: its command line, its checks, and a daemon that is ready, fails, dies or is silent."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mxfsd import procs, spawn
from mxfsd.cli import mount, systemd
from mxfsd.cli.mount import MountError, parse_arguments
from mxfsd.options import MountOptions, parse

STUB = """
import os, sys, time
fd = int(sys.argv[sys.argv.index("--ready-fd") + 1])
def say(line):
    os.write(fd, line.encode()); os.close(fd)
"""


def test_the_way_mount_calls_it() -> None:
    arguments = parse_arguments(["/dev/sdb", "/mnt", "-s", "-n", "-o", "rw,noatime", "-o", "port=7", "-v"])
    assert arguments == mount.Arguments(
        "/dev/sdb", "/mnt", "rw,noatime,port=7", sloppy=True, verbose=True, fake=False, namespace=None
    )
    assert parse_arguments(["a", "b", "-r", "-t", "mxfs", "-N", "/proc/1/ns/mnt"]).options == "ro"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "usage:"),
        (["/dev/sdb"], "usage:"),
        (["a", "b", "c"], "usage:"),
        (["a", "b", "-x"], "option -x not recognized"),
        (["a", "b", "-o"], "option -o requires argument"),
        (["a", "b", "-t", "xfs"], "type xfs is not mxfs"),
    ],
)
def test_bad_command_lines(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mount.main(words) == 1
    said = capsys.readouterr().err
    assert reason in said
    assert said.startswith("mount.mxfs: ")
    assert said.count("\n") == 1


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert mount.main(["/dev/null", "/", "-o", "rw,colour=red"]) == 1
    assert "mount.mxfs: /dev/null: unknown option colour=red; known are" in capsys.readouterr().err


def test_mount_points_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="is not a directory"):
        mount.check_directory(str(tmp_path / "file"))
    with pytest.raises(MountError, match="No such file"):
        mount.check_directory(str(tmp_path / "absent"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert mount.check_directory(str(tmp_path / "link")) == os.path.realpath(tmp_path)


def test_devices_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    with pytest.raises(MountError, match="regular file: attach it with losetup"):
        mount.check_device(str(tmp_path / "image"))
    with pytest.raises(MountError, match="not a block device"):
        mount.check_device("/dev/null")
    with pytest.raises(MountError, match="No such file"):
        mount.check_device(str(tmp_path / "absent"))


def test_a_tag_that_nothing_has() -> None:
    assert mount.resolve("/dev/sd=b") == "/dev/sd=b"
    with pytest.raises(MountError, match="no device with UUID 00000000"):
        mount.resolve("UUID=00000000-dead-beef-0000-000000000000")


@pytest.fixture
def image(tmp_path: Path) -> Iterator[str]:
    """A loop device of 8 MiB of zeros."""
    path = tmp_path / "image"
    path.write_bytes(b"\\0")
    os.truncate(path, 8 << 20)
    loop = subprocess.run(
        ["losetup", "--find", "--show", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield loop
    subprocess.run(["losetup", "--detach", loop], check=True)


@pytest.mark.needs("root", "loop")
def test_a_blank_device_and_a_foreign_one_are_named(image: str, tmp_path: Path) -> None:
    with pytest.raises(MountError, match=f"holds no file system: make a volume with mkfs.mxfs {image}"):
        mount.volume_uuid(image)
    subprocess.run(["mkswap", image], check=True, capture_output=True)
    with pytest.raises(MountError, match="holds swap, no MXFS volume"):
        mount.volume_uuid(image)


@pytest.mark.needs("root", "loop")
def test_a_read_only_device_is_refused(image: str) -> None:
    # On a loop device the mark outlives the device's file, so it is always taken back.
    subprocess.run(["blockdev", "--setro", image], check=True)
    try:
        with pytest.raises(MountError, match="is read-only"):
            mount.check_device(image)
    finally:
        subprocess.run(["blockdev", "--setrw", image], check=True)


@pytest.mark.needs("root", "loop")
def test_a_claimed_device_is_refused(image: str) -> None:
    mount.check_unused(image)
    fd = os.open(image, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(MountError, match="is in use on this host"):
            mount.check_unused(image)
    finally:
        os.close(fd)


@pytest.mark.needs("root", "loop")
def test_a_locked_device_is_waited_for_and_then_refused(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "LOCK_S", 0.0)
    with mount._DeviceLock(image):
        with pytest.raises(MountError, match="holds the device locked"):
            with mount._DeviceLock(image):
                pass
    with mount._DeviceLock(image):
        pass


class _Volume:
    """A mount.mxfs whose device checks pass and whose daemon is a script."""

    def __init__(self, tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.image, self.root, self.dir = image, tmp_path / "run", tmp_path / "mnt"
        self.dir.mkdir()
        self.options = MountOptions(state=str(self.root))
        self.run_dir = self.root / "the-uuid"
        self._patch = monkeypatch
        monkeypatch.setattr(mount, "volume_uuid", lambda device: "the-uuid")

    def mount(self, script: str) -> mount.Mounted:
        argv = [sys.executable, "-c", STUB + script]
        self._patch.setattr(mount, "daemon_command", lambda *words: argv)
        return mount.mount_volume(self.image, str(self.dir), self.options, direct=True)

    def left(self) -> list[int]:
        return [pid for pid in procs._pids() if procs.has_variable(pid, spawn.TOKEN_ENV) and self._ours(pid)]

    def _ours(self, pid: int) -> bool:
        try:
            return str(self.image) in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            return False


@pytest.fixture
def volume(tmp_path: Path, image: str, monkeypatch: pytest.MonkeyPatch) -> _Volume:
    monkeypatch.setenv("MXFS_TEST_DEVICE", image)
    return _Volume(tmp_path, image, monkeypatch)


@pytest.mark.needs("root", "loop")
def test_a_ready_daemon_is_left_running_as_nobodys_child(volume: _Volume) -> None:
    mounted = volume.mount("say('ready\\n'); time.sleep(60)")
    assert mounted.daemon is not None
    try:
        assert mounted.daemon.processes() == [mounted.daemon.pid]
        status = Path(f"/proc/{mounted.daemon.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" not in status
        assert os.getsid(mounted.daemon.pid) != os.getsid(0)
        assert os.readlink(f"/proc/{mounted.daemon.pid}/fd/2") == str(volume.run_dir / "daemon.log")
        assert stat.S_IMODE(volume.run_dir.stat().st_mode) == 0o700
        # Nothing of this process may leak into the daemon: its pipe, and the interpreter's own, are all it has.
        assert {os.readlink(f"/proc/{mounted.daemon.pid}/fd/{fd}") for fd in (0, 1)} == {"/dev/null"}
        assert not procs.holds(mounted.daemon.pid, volume.image)
    finally:
        mounted.daemon.end()
    assert volume.left() == []


FAILURES = [
    ("say('error: the disk is on fire\\n'); time.sleep(60)", "the disk is on fire"),
    ("say('error:\\n')", "the daemon failed"),
    ("sys.exit(3)", "the daemon ended before it was ready"),
    ("print('Boom: it broke', file=sys.stderr); sys.exit(3)", r"its last words: Boom: it broke"),
    ("say('rea'); sys.exit(0)", "the daemon ended before it was ready"),
]


@pytest.mark.needs("root", "loop")
@pytest.mark.parametrize(("script", "reason"), FAILURES)
def test_a_failed_mount_leaves_nothing(volume: _Volume, script: str, reason: str) -> None:
    with pytest.raises(MountError, match=reason) as caught:
        volume.mount(script)
    assert caught.value.code == 32
    assert "\n" not in str(caught.value)
    assert not volume.run_dir.exists()
    assert volume.left() == []


@pytest.mark.needs("root", "loop")
def test_a_silent_daemon_is_ended_with_its_helpers(volume: _Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "READY_S", 0.5)
    monkeypatch.setattr(spawn, "TERM_S", 0.2)
    # A helper in a session of its own, and a daemon deaf to SIGTERM.
    script = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    )
    with pytest.raises(MountError, match=r"not ready within 0\.5 s"):
        volume.mount(script)
    assert volume.left() == []
    assert not volume.run_dir.exists()


@pytest.mark.needs("root", "loop")
def test_a_failure_keeps_the_nodes_identity(volume: _Volume) -> None:
    volume.run_dir.mkdir(parents=True)
    (volume.run_dir / "node-x.json").write_text("{}")
    with pytest.raises(MountError):
        volume.mount("sys.exit(1)")
    assert [path.name for path in volume.run_dir.iterdir()] == ["node-x.json"]


@pytest.mark.needs("root", "loop")
def test_an_interrupt_ends_the_daemon(volume: _Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spawn, "wait_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        volume.mount("time.sleep(60)")
    assert volume.left() == []
    assert not volume.run_dir.exists()


def test_a_program_that_cannot_start(tmp_path: Path) -> None:
    daemon, fd = spawn.launch([str(tmp_path / "absent")], str(tmp_path / "log"))
    try:
        with pytest.raises(spawn.DaemonFailed, match="cannot start"):
            spawn.wait_ready(fd, 10, str(tmp_path / "log"))
    finally:
        os.close(fd)
    assert daemon.wait_gone(5)


@pytest.mark.needs("netns")
def test_a_network_namespace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spawn.launch(["/bin/true"], str(tmp_path / "log"), netns=str(tmp_path / "absent"))


def test_the_daemons_options_parse_again() -> None:
    options = parse("ro,peer=10.0.0.1,node=a,noexec,state=/run/x")
    argv = mount.daemon_command("/dev/sdb", "/mnt", options)
    assert parse(argv[argv.index("--options") + 1]) == options


def test_start_up_imports_nothing_heavy() -> None:
    code = (
        "import sys, mxfsd.cli.mount, mxfsd.io.lockspace\n"
        "heavy = {'cryptography', 'pyroute2', 'pyfuse3', 'structlog', 'asyncio', 'trio'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_unit_runs_the_daemon_with_the_values_of_its_environment_file(tmp_path: Path) -> None:
    """The unit's command line, run by hand as systemd.exec(5) and systemd.service(5) say that systemd runs it."""
    unit = Path(__file__).parents[2] / "systemd" / systemd.UNIT
    line = next(text for text in unit.read_text().splitlines() if text.startswith("ExecStart="))
    script = line.removeprefix("ExecStart=/bin/sh -c '").removesuffix("'").replace("$$", "$")
    run_dir = tmp_path / "u"
    run_dir.mkdir()
    script = script.replace("/run/mxfs/%i", str(run_dir))
    os.mkfifo(run_dir / "ready")
    fd = os.open(run_dir / "ready", os.O_RDONLY | os.O_NONBLOCK)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT"\necho oops >&2\necho ready >&3\n')
    fake.chmod(0o755)
    mountpoint = "/mnt/a 'b' \"c\" $d"
    environment = {
        "MXFS_PYTHON": str(fake),
        "MXFS_DEVICE": "/dev/sdb",
        "MXFS_MOUNTPOINT": mountpoint,
        "MXFS_OPTIONS": "rw,node=x",
        "OUT": str(tmp_path / "out"),
    }
    try:
        subprocess.run(["/bin/sh", "-c", script], env=environment, check=True)
        spawn.wait_ready(fd, 5, str(run_dir / "daemon.log"))
    finally:
        os.close(fd)
    words = (tmp_path / "out").read_text().splitlines()
    assert words[words.index("--mountpoint") + 1] == mountpoint
    assert words[words.index("--options") + 1] == "rw,node=x"
    assert (run_dir / "daemon.log").read_text() == "oops\n"


def test_environment_files_are_quoted() -> None:
    text = systemd.environment_file({"A": 'x "y" $z \\ `w`'})
    assert text == 'A="x \\"y\\" \\$z \\\\ \\`w\\`"\n'


def test_signals_are_default_in_the_daemon(tmp_path: Path) -> None:
    code = (
        STUB + "import signal\nsay('ready\\n' if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL else 'error: x\\n')"
    )
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        daemon, fd = spawn.launch([sys.executable, "-c", code], str(tmp_path / "log"))
    finally:
        signal.signal(signal.SIGTERM, before)
    try:
        spawn.wait_ready(fd, 10, str(tmp_path / "log"))
    finally:
        os.close(fd)
    assert daemon.wait_gone(10)
