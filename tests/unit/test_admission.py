"""Finding out which volume is on a disk that is reserved by other hosts: let in for one read, and out again."""

import errno

import pytest
from faketarget import FakeTarget

from mxfs_proto.errors import IoFailure
from mxfsd import admission
from mxfsd.pr import probe
from mxfsd.pr.reservations import Reservations

OTHER = 0xA
UUID = bytes(range(16))


class Disk:
    """A device that answers reads as its target's reservation allows, seen from host b."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target = FakeTarget()
        self.other = Reservations("disk", [self.target.nexus("a")])
        self.in_use = False
        self.readable = True
        monkeypatch.setattr(admission, "_read", self._read)
        monkeypatch.setattr(admission, "unused", lambda _device: not self.in_use)
        mine = probe.Probe(Reservations("disk", [self.target.nexus("b")]), "sg", "")
        self.asked: list[str] = []

        def opened(device: str) -> probe.Probe:
            self.asked.append(device)
            return mine if device != "none" else probe.Probe(None, "none", "a test has none")

        monkeypatch.setattr(probe, "open_reservations", opened)

    def _read(self, _device: str) -> bytes:
        if not self.target.allowed("b"):
            raise IoFailure("read: Invalid exchange", errno.EBADE)
        if not self.readable:
            raise IoFailure("read: Input/output error", errno.EIO)
        return UUID

    def reserve(self) -> None:
        """Another node mounts."""
        self.other.register(OTHER)
        self.other.reserve()

    @property
    def registered(self) -> set[int]:
        return set(self.other.read_keys().keys)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_an_open_disk_is_just_read(disk: Disk) -> None:
    assert admission.volume_of("disk") == UUID
    assert disk.registered == set()


def test_reservations_that_are_elsewhere(disk: Disk) -> None:
    disk.reserve()
    assert admission.volume_of("disk", "elsewhere") == UUID
    assert (disk.asked, disk.registered) == (["elsewhere"], {OTHER})
    with pytest.raises(IoFailure, match="disk is reserved by another host, and a test has none") as caught:
        admission.volume_of("disk", "none")
    assert caught.value.errno == errno.EBADE


def test_a_reserved_disk_is_read_and_the_registration_taken_back(disk: Disk) -> None:
    disk.reserve()
    assert admission.volume_of("disk") == UUID
    assert disk.registered == {OTHER}
    assert not disk.target.allowed("b")


def test_a_read_that_fails_takes_it_back_too(disk: Disk) -> None:
    disk.reserve()
    disk.readable = False
    with pytest.raises(IoFailure, match="Input/output error"):
        admission.volume_of("disk")
    assert disk.registered == {OTHER}


def test_a_host_that_was_fenced_and_still_uses_the_disk_is_not_let_in(disk: Disk) -> None:
    disk.reserve()
    disk.in_use = True
    with pytest.raises(IoFailure, match="Invalid exchange"):
        admission.volume_of("disk")
    assert disk.registered == {OTHER}


def test_a_disk_that_is_reserved_and_tells_nothing_about_it(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.reserve()
    monkeypatch.setattr(probe, "open_reservations", lambda _device: probe.Probe(None, "sg", "disk is no SCSI disk"))
    with pytest.raises(IoFailure, match="reserved by another host, and disk is no SCSI disk"):
        admission.volume_of("disk")
