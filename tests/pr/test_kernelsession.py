"""One more nexus beside the kernel's: what sysfs says of its session, in a folder of our own, and a real target."""

from pathlib import Path

import pytest
from tgt import HOST, Tgt

from mxfsd.lab.target import LUN, NAME
from mxfsd.pr import kernelsession
from mxfsd.pr.errors import NotOffered, PathFailure
from mxfsd.pr.iscsi import Iscsi
from mxfsd.pr.kernelsession import open_beside
from mxfsd.pr.keys import make_key
from mxfsd.pr.reservations import Reservations, Standing
from mxfsd.pr.scsi import ScsiNexus
from mxfsd.pr.sgio import SgIo

pytestmark = pytest.mark.needs("tgt")

INITIATOR = "iqn.2026-11.net.mxfs.test:host"
USER, SECRET = "host", "a long secret"
TIMEOUT_MS = 5_000


def disk(tmp_path: Path, tgt: Tgt, **other: str) -> Path:
    """Return the folder of a disk in a sysfs as scsi_transport_iscsi makes it; *other*: attributes that differ."""
    session = tmp_path / "sys/devices/platform/host2/session1"
    found = session / f"target2:0:0/2:0:0:{other.pop('lun', str(LUN))}/block/sda"
    found.mkdir(parents=True)
    told = {"targetname": NAME, "initiatorname": INITIATOR, "username": "(null)"}
    portal = {"address": HOST, "port": str(tgt.port), "persistent_address": "192.0.2.1", "persistent_port": "1"}
    for folder, attributes in (
        (session / "iscsi_session/session1", told),
        (session / "connection1:0/iscsi_connection/connection1:0", portal),
    ):
        folder.mkdir(parents=True)
        for name, value in (attributes | other).items():
            (folder / name).write_text(f"{value}\n")
    return found


def works(session: Iscsi | None) -> bool:
    assert session is not None
    with_keys = ScsiNexus(session).read_keys()
    session.close()
    return with_keys.keys == ()


def test_one_more_session(tmp_path: Path, tgt: Tgt) -> None:
    assert works(SgIo("/dev/null", timeout_ms=TIMEOUT_MS, sysfs=disk(tmp_path, tgt)).spare())


def test_the_portal_that_was_given_where_the_present_one_is_not_known(tmp_path: Path, tgt: Tgt) -> None:
    unknown = {"address": "(null)", "port": "0", "persistent_address": HOST, "persistent_port": str(tgt.port)}
    assert works(open_beside(disk(tmp_path, tgt, **unknown), TIMEOUT_MS))


def test_a_target_that_wants_a_secret(tmp_path: Path, tgt: Tgt) -> None:
    tgt.protect(USER, SECRET)
    assert works(open_beside(disk(tmp_path / "right", tgt, username=USER, password=SECRET), TIMEOUT_MS))
    for name, other in (("none", {}), ("wrong", {"username": USER, "password": "another secret"})):
        with pytest.raises(PathFailure):
            open_beside(disk(tmp_path / name, tgt, **other), TIMEOUT_MS)


@pytest.mark.parametrize("other", [{"targetname": ""}, {"initiatorname": "<NULL>"}, {"lun": "256"}])
def test_what_sysfs_does_not_tell(tmp_path: Path, tgt: Tgt, other: dict[str, str]) -> None:
    assert open_beside(disk(tmp_path, tgt, **other), TIMEOUT_MS) is None


def test_a_session_that_is_gone(tmp_path: Path, tgt: Tgt) -> None:
    found = disk(tmp_path, tgt)
    for attribute in found.parents[3].glob("connection1:0/iscsi_connection/connection1:0/*"):
        attribute.unlink()
    assert open_beside(found, TIMEOUT_MS) is None


def test_a_disk_that_is_not_of_iscsi(tmp_path: Path) -> None:
    assert open_beside(tmp_path / "pci0000:00/ata1/host0/target0:0:0/0:0:0:0/block/sda", TIMEOUT_MS) is None
    assert SgIo("/dev/null").spare() is None


def test_a_host_without_libiscsi(tmp_path: Path, tgt: Tgt, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise NotOffered("libiscsi is not installed")

    monkeypatch.setattr(kernelsession, "Iscsi", missing)
    assert open_beside(disk(tmp_path, tgt), TIMEOUT_MS) is None


def test_what_is_left_of_a_fenced_holder_is_taken_over_from_a_kernel_s_disk(
    tmp_path: Path, tgt: Tgt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on hosts with open-iscsi: tgtd takes names of initiators for the reservation (see test_holder.py)."""
    nodes = []
    for number, name in enumerate("ab", 1):
        session = tgt.initiator(name)
        monkeypatch.setattr(session, "spare", SgIo("/dev/null", sysfs=disk(tmp_path / name, tgt)).spare)
        node = Reservations(name, [ScsiNexus(session)])
        node.register(make_key(number, 1))
        node.reserve()
        nodes.append(node)
    a, b = nodes
    b.paths[0].preempt(b.key, a.key, abort=False)
    others = [tgt.initiator("x" * 16) for _ in range(20)]
    assert b.check() is Standing.LOST
    b.reestablish(lambda: True)
    assert b.check() is Standing.OK
    assert b.read_keys().keys == (b.key,)
    for session in others:
        session.close()
    assert b.check() is Standing.OK
