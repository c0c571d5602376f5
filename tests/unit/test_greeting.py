"""HELLO, WELCOME and REFUSE: the payloads, and the two roles over real TLS with what must end in a clear refusal."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import diskimage
import pytest
import structlog
from twodaemons import Cluster, Quiet, cluster, until

from mxfs_proto.errors import IoFailure, PeerError, Refusal
from mxfs_proto.frames import (
    HEADER,
    FrameType,
    LeaseAck,
    encode_header,
    pack_json,
    pack_lease,
    pack_lease_ack,
    pack_lock,
    unpack_json,
)
from mxfs_proto.modes import LockMode
from mxfs_proto.ondisk import Address
from mxfs_proto.ops import Fid
from mxfs_proto.records import LockRelease
from mxfsd import greeting
from mxfsd.clientrole import ClientRole
from mxfsd.io import stream
from mxfsd.io.clock import now_ms
from mxfsd.io.peers import PeerServer


def test_payloads() -> None:
    fields = unpack_json(greeting.hello("n2", 2, "fast", "lease"))
    assert greeting.objection(fields, "n1", "fast", "lease") is None
    assert greeting.objection(fields, "n1", "default", "lease") == (
        "node n2 has timeouts=fast, home n1 has timeouts=default: use the same"
    )
    assert greeting.objection(fields, "n1", "fast", "pr") == (
        "node n2 has fencing=lease, home n1 has fencing=pr: use the same"
    )
    assert greeting.objection({}, "n1", "default", "lease") is not None
    welcome = greeting.read_welcome(unpack_json(greeting.welcome(7, 1, Fid(128, 3), 9)))
    assert welcome == greeting.Welcome(7, 1, Fid(128, 3), 9)


@pytest.mark.parametrize("fields", [{}, {"epoch": 1, "home": 1}, {"epoch": "x", "home": 1, "root": [1, 2]}])
def test_a_welcome_that_lacks_something(fields: dict[str, Any]) -> None:
    with pytest.raises(PeerError, match="WELCOME"):
        greeting.read_welcome(fields)


def test_refusals_are_one_line_and_say_whether_to_try_again() -> None:
    final = greeting.read_refusal({"reason": "no\nway", "retry": False}, "n1")
    assert isinstance(final, Refusal) and str(final) == "refused by n1: no way"
    later = greeting.read_refusal({"reason": "busy", "retry": True}, "n1")
    assert isinstance(later, IoFailure) and "busy" in str(later)
    assert isinstance(greeting.read_refusal({}, "n1"), Refusal)


# -- two daemons without mounts ---------------------------------------------------------------------------------------


def reasons(logs: list[Any], *events: str) -> str:
    return " / ".join(str(entry.get("reason")) for entry in logs if entry["event"] in events)


async def test_a_node_joins_and_gets_leases_that_count_from_its_own_request(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        begun = now_ms()
        node = both.node
        node.client = ClientRole(node)
        await node.client.connect()
        assert (node.epoch, node.home_slot, node.root) == (5, 1, Fid(128, 1))
        await until(lambda: node.client_lease_until_ms > 0)
        assert begun + both.lease_ms <= node.client_lease_until_ms <= now_ms() + both.lease_ms
        assert both.home.members is not None
        # The home counts from its receipt of the request, so its count ends later.
        assert node.client_lease_until_ms <= both.home.members.heard_ms(2) + both.lease_ms
        before = node.client_lease_until_ms
        await until(lambda: node.client_lease_until_ms > before)  # it asks again by itself
        client: Any = node.client
        before = node.client_lease_until_ms
        for wrong in (LeaseAck(both.lease_ms, now_ms() + 5000), LeaseAck(both.lease_ms + 1, client._asked_ms[-1])):
            both.home.peers[2].send(FrameType.LEASE_ACK, pack_lease_ack(wrong))
        both.home.peers[2].send(FrameType.FREEZE, b"{}")  # those before it have been handled
        quiet: Any = node.fuse
        frozen = quiet.calls.count("freeze")
        await until(lambda: quiet.calls.count("freeze") > frozen)
        assert node.client_lease_until_ms <= client._asked_ms[-1] + both.lease_ms


async def test_operations_and_locks_count_when_the_node_has_named_what_it_holds(tmp_path: Path) -> None:
    """What it sent before it knew of the new connection would be granted to it, and taken from it by what it names."""
    async with cluster(tmp_path) as both:
        home: Any = both.home
        home.serving = True
        home.succession = Quiet()
        client = ClientRole(both.node)
        both.node.client = client
        await client.connect()
        conn: Any = client._conn
        release = LockRelease(5, 1, LockMode.NL, 0, 0)

        def say() -> None:
            conn.send(FrameType.OP_REQ, b"", epoch=5, session=1, seq=1)
            conn.send(FrameType.LOCK, pack_lock(release), epoch=5)
            conn.send(FrameType.LEASE, pack_lease(now_ms()), epoch=5)

        say()
        conn.send(FrameType.RECLAIM_DONE, pack_json({"rows": 0}), epoch=5)
        await until(lambda: "reclaimed" in home.home.calls)
        assert not {"on_operation", "on_lock"} & set(home.home.calls)
        say()
        await until(lambda: "on_lock" in home.home.calls)
        assert "on_operation" in home.home.calls
        await client.connect()  # anew
        conn = client._conn
        home.home.calls.clear()
        say()
        conn.send(FrameType.RECLAIM_DONE, pack_json({"rows": 0}), epoch=5)
        await until(lambda: "reclaimed" in home.home.calls)
        assert not {"on_operation", "on_lock"} & set(home.home.calls)


async def test_a_home_whose_own_lease_ended_gives_no_lease(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        node, home = both.node, both.home
        assert home.members is not None
        node.client = ClientRole(node)
        await node.client.connect()
        await until(lambda: node.client_lease_until_ms > 0)
        home._claimed_until_ms = 0
        # Let an answer that was under way arrive: the second request from now is heard by a home without a lease.
        for _ in range(2):
            heard = home.members.heard_ms(2)
            await until(lambda: home.members.heard_ms(2) > heard)  # noqa: B023 - called before the loop goes on
        before = node.client_lease_until_ms
        heard = home.members.heard_ms(2)
        await until(lambda: home.members.heard_ms(2) > heard)
        assert node.client_lease_until_ms == before


async def refused(both: Cluster, tries: int = 1) -> tuple[str, str]:
    """Have the node settle, which must fail; return the reason that it gives, and what the home logged."""
    node: Any = both.node
    with structlog.testing.capture_logs() as logs:
        client = ClientRole(node)
        for _ in range(tries - 1):
            with pytest.raises(IoFailure):
                await client.connect()
            both.renew()
        with pytest.raises(Refusal) as caught:
            await node._become_client(client)
        await until(lambda: bool(reasons(logs, "peer refused", "peer_refused")))
    assert node.client is None and both.home.peers == {}
    assert "\n" not in str(caught.value)
    return str(caught.value), reasons(logs, "peer refused", "peer_refused")


async def test_other_timeouts(tmp_path: Path) -> None:
    async with cluster(tmp_path, node_options="timeouts=default") as both:
        here, there = await refused(both)
        expected = "node n2 has timeouts=default, home n1 has timeouts=fast: use the same"
        assert there == expected and here.endswith(expected) and here.startswith("refused by node 1 at 127.0.0.1")


async def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(tmp_path) as both:
        newer = {"HELLO"}

        def encode(kind: FrameType, length: int, epoch: int = 0, session: int = 0, seq: int = 0) -> bytes:
            header = bytearray(encode_header(kind, length, epoch, session, seq))
            if kind.name in newer:
                struct.pack_into("!B", header, 2, 2)
            assert len(header) == HEADER.size
            return bytes(header)

        # First the home meets a newer node; it says so in a frame of its own version.
        monkeypatch.setattr(stream, "encode_header", encode)
        here, there = await refused(both)
        assert there == "a peer of another version: it speaks 2, we speak 1"
        assert here.endswith("a peer of another version: it speaks 2, we speak 1")
        # Then as such a node sees it: the home's answer has a version that it does not know.
        newer.add("REFUSE")
        here, _ = await refused(both)
        assert here == "a peer of another version: it speaks 2, we speak 1"


async def test_an_evicted_incarnation(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        both.home.evicted.add((2, 1))
        here, there = await refused(both)
        assert "slot 2, incarnation 1 was put out of the volume: mount again there" in here
        assert "slot 2, incarnation 1 was put out of the volume" in there
        both.certify(both.node, diskimage.KEY, incarnation=2)  # it has mounted again
        both.node.client = ClientRole(both.node)
        await both.node.client.connect()
        assert both.home.peers[2].identity.incarnation == 2


async def test_another_cluster_key_is_refused_once_the_home_is_known_to_live(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        both.certify(both.node, b"x" * 32)
        client = ClientRole(both.node)
        for _ in range(3):  # the home may be dead, and somebody else have its address
            with pytest.raises(IoFailure, match="has another cluster key"):
                await client.connect()
        here, there = await refused(both, tries=2)
        assert "has another cluster key, or is not of this volume" in here
        assert "does not accept our certificate: it has another cluster key" in there


async def test_what_is_worth_another_try(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        node: Any = both.node
        home: Any = both.home
        client = ClientRole(node)

        async def fails(match: str) -> None:
            with pytest.raises(IoFailure, match=match):
                await client.connect()
            assert not await node._become_client(client)

        home._claimed_until_ms = 0
        await fails("not the home")
        home._claimed_until_ms = now_ms() + 600_000
        both.certify(home, diskimage.KEY, incarnation=9)  # whose certificate another daemon at the address has
        home.server.close()
        home.server = PeerServer(home.contexts.server, home._check_peer, home._on_peer)
        [(_, port)] = home.server.start([("127.0.0.1", 0)])
        record = home.held.record
        home.lockspace.write_slot(replace(record, addresses=(Address("127.0.0.1", port),), counter=3))
        await fails("slot 1, incarnation 9 answers, not the home")
        home.server.close()
        await fails("Connect call failed")
        home.lockspace.write_slot(replace(record, counter=4))
        await fails("no address")
