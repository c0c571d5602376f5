"""What systemd is told: sd_notify(3) over a datagram socket, the watchdog's words of life, and the unit's sandbox."""

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from mxfsd.cli.systemd import UNIT
from mxfsd.io.servicemanager import ServiceManager

UNIT_FILE = Path(__file__).parents[2] / "systemd" / UNIT
EXPOSURE_MAX = 5.0


class Listener:
    """Stands for systemd's socket."""

    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(address)
        self.sock.setblocking(False)

    def heard(self) -> list[str]:
        texts = []
        while True:
            try:
                texts.append(self.sock.recv(4096).decode())
            except BlockingIOError:
                return texts


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(str(tmp_path / "notify"))
    yield made
    made.sock.close()


def manager(listener: Listener, **more: str) -> ServiceManager:
    return ServiceManager.take({"NOTIFY_SOCKET": listener.sock.getsockname(), **more})


def test_ready_and_status(listener: Listener) -> None:
    told = manager(listener)
    told.ready("home,\nepoch 1")
    told.status("home, epoch 2")
    told.status("home, epoch 2")
    assert listener.heard() == ["READY=1\nSTATUS=home, epoch 1", "STATUS=home, epoch 2"]


def test_words_of_life_come_at_a_quarter_of_the_limit(listener: Listener) -> None:
    told = manager(listener, WATCHDOG_USEC="8000000", WATCHDOG_PID=str(os.getpid()))
    for now_ms in range(1_000, 9_001, 250):
        told.alive(now_ms)
    assert listener.heard() == ["WATCHDOG=1"] * 5


def test_without_a_watchdog_none_is_fed(listener: Listener) -> None:
    manager(listener).alive(1)
    manager(listener, WATCHDOG_USEC="8000000", WATCHDOG_PID=str(os.getpid() + 1)).alive(1)
    assert listener.heard() == []


@pytest.mark.parametrize(
    ("ready", "clean", "words"),
    [
        (True, True, ["STOPPING=1\nSTATUS=unmounted"]),
        # Else it would count as a failure, and start again. In one datagram systemd would see STOPPING= only.
        (False, True, ["READY=1", "STOPPING=1\nSTATUS=unmounted"]),
        (False, False, ["STOPPING=1\nSTATUS=unmounted"]),
    ],
)
def test_leaving(listener: Listener, ready: bool, clean: bool, words: list[str]) -> None:
    told = manager(listener)
    if ready:
        told.ready("")
        listener.heard()
    told.leaving("unmounted", clean=clean)
    assert listener.heard() == words


def test_an_abstract_address() -> None:
    name = f"mxfs-test-{os.getpid()}"
    heard = Listener(f"\0{name}")
    try:
        ServiceManager.take({"NOTIFY_SOCKET": f"@{name}"}).ready("x")
        assert heard.heard() == ["READY=1\nSTATUS=x"]
    finally:
        heard.sock.close()


def test_helpers_do_not_inherit_it() -> None:
    environment = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "HOME": "/root"}
    ServiceManager.take(environment)
    assert environment == {"HOME": "/root"}


def test_nobody_listens(tmp_path: Path) -> None:
    ServiceManager().ready("x")
    with capture_logs() as lines:
        ServiceManager.take({"NOTIFY_SOCKET": str(tmp_path / "absent")}).ready("x")
    assert [line["event"] for line in lines] == ["the service manager was not told"]


def test_a_full_socket_does_not_hold_the_event_loop(listener: Listener) -> None:
    told = manager(listener, WATCHDOG_USEC="4000")
    listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for now_ms in range(2000):  # unread: the queue of such a socket is short
        told.alive(now_ms)
    assert 0 < len(listener.heard()) < 2000


# -- the unit ----------------------------------------------------------------------------------------------------------

_NAMESPACES = re.compile(
    r"^(Protect(System|Home|Proc|Kernel\w+|ControlGroups)|ProcSubset|Private(Tmp|Devices|Mounts|IPC|Users)|MountFlags|"
    r"(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|TemporaryFileSystem|Root(Directory|Image)|"
    r"LogNamespace|DynamicUser|MountImages|ExtensionImages|ExtensionDirectories|IPCNamespacePath)="
)
"""Directives of systemd.exec(5) that give a service a mount namespace of its own (PrivateMounts= lists most)."""


def test_the_units_mounts_are_seen_outside() -> None:
    assert [line for line in UNIT_FILE.read_text().splitlines() if _NAMESPACES.match(line)] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_units_exposure() -> None:
    """What ``systemd-analyze security`` makes of the sandbox: 0 is none at all, 10 everything."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT_FILE)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"Overall exposure level .*: ([0-9.]+) ", done.stdout)
    assert found is not None and float(found[1]) <= EXPOSURE_MAX, done.stdout
