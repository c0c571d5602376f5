"""Announcements in use: a joiner finds the home by them, and through the disk without them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import diskimage
import pytest
import structlog
from netspaces import two_namespaces
from twodaemons import VOLUME, Cluster, cluster, until

from mxfs_proto.discovery import Announcement
from mxfs_proto.errors import IoFailure
from mxfs_proto.ondisk import Address
from mxfsd.clientrole import ClientRole
from mxfsd.finder import Finder, config_of
from mxfsd.io.certs import VolumeKeys
from mxfsd.options import MountOptions, parse

KEYS = VolumeKeys.derive(diskimage.KEY, VOLUME)
HOUR_MS = 3_600_000


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


class Node:
    """A Finder that announces *said* and notes the homes that it heard of."""

    def __init__(
        self, slot: int, home_slot: int, options: MountOptions, keys: VolumeKeys = KEYS, period_ms: int = HOUR_MS
    ) -> None:
        self.said = Announcement(keys.volume, UUID(int=slot), slot, 7, f"10.9.9.{slot}", 4700 + slot, home_slot, 5)
        self.homes: list[tuple[int, int]] = []
        self.finder = Finder(options, keys, period_ms, lambda: self.said, lambda *home: self.homes.append(home))
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.finder.start()
        self.task = asyncio.get_running_loop().create_task(self.finder.run())

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.finder.close()
        await self.finder.close()

    @property
    def counts(self) -> Any:
        return self.finder.report()["counts"]


@contextlib.asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    try:
        for node in nodes:
            await node.start()
        yield
    finally:
        for node in nodes:
            await node.close()


def local() -> MountOptions:
    """Announcements to every daemon of this host."""
    return parse(f"broadcast=127.255.255.255,port={free_port()}")


def test_the_mount_options() -> None:
    config = config_of(parse(""))
    assert (config.mode, config.targets, config.iface) == ("multicast", [("239.255.77.88", 7788)], None)
    config = config_of(parse("multicast=239.1.1.1,port=99,iface=eth7"))
    assert (config.mode, config.targets, config.iface) == ("multicast", [("239.1.1.1", 99)], "eth7")
    assert config_of(parse("broadcast=10.0.0.255")).targets == [("10.0.0.255", 7788)]
    assert config_of(parse("peer=10.0.0.1,10.0.0.2,port=99")).targets == [("10.0.0.1", 99), ("10.0.0.2", 99)]


async def test_a_joiner_hears_from_the_home_at_once_and_its_wait_ends() -> None:
    options = local()
    home, joiner = Node(1, 1, options), Node(2, 0, options)
    async with running(home):
        await until(lambda: home.counts.get("own") == 1)  # its next announcement by itself is an hour away
        async with running(joiner), asyncio.timeout(10):
            await joiner.finder.pause(3600)
            assert joiner.homes == [(1, 5)]
            assert joiner.finder.addresses(1, 7) == [Address("10.9.9.1", 4701), Address("127.0.0.1", 4701)]
            assert joiner.finder.addresses(1, 8) == [] and joiner.finder.addresses(3, 7) == []
            assert joiner.finder.report()["heard"] == [1]
            await joiner.finder.pause(0)  # the news was used up: nothing to wait for


async def test_a_home_that_moved_is_news_and_what_is_old_or_hearsay_is_not() -> None:
    options = local()
    home, other, node = Node(1, 1, options), Node(3, 1, options), Node(2, 1, options)
    async with running(node, home, other):
        await until(lambda: node.homes == [(1, 5)] and node.finder.report()["heard"] == [1, 3])
        await node.finder.pause(10)

        async def say(who: Node, **changes: Any) -> None:
            who.said = replace(who.said, **changes)
            accepted = node.counts["accepted"]
            who.finder.announce_soon()
            await until(lambda: node.counts["accepted"] > accepted)

        await say(home)  # the same again
        await say(home, home_slot=3, epoch=6)  # it says that 3 is home; 3 has not said so
        assert node.homes == [(1, 5)]
        await say(other, home_slot=3, epoch=6)
        assert node.homes == [(1, 5), (3, 6)]
        async with asyncio.timeout(10):
            await node.finder.pause(3600)
        await say(home, home_slot=1, epoch=5)  # a home of before that does not know yet
        assert node.homes == [(1, 5), (3, 6)]
        await say(other, port=99)
        assert node.homes == [(1, 5), (3, 6), (3, 6)]
        assert node.finder.addresses(3, 7)[0].port == 99


async def test_foreign_announcements_are_counted_in_the_status() -> None:
    options = local()
    node = Node(2, 0, options)
    foreign = Node(1, 1, options, VolumeKeys.derive(b"x" * 32, VOLUME))
    async with running(node, foreign):
        await until(lambda: node.counts.get("foreign", 0) >= 1)
        report = node.finder.report()
    assert report["on"] and report["heard"] == [] and node.homes == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("iface=mxfs-none", "mxfs-none"),
        ("multicast=ff02::1", "no IPv4 address"),
        ("peer=127.0.0.1", "Address already in use"),
    ],
)
async def test_without_a_socket_there_is_a_warning_and_no_more(options: str, reason: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 0))
        node = Node(2, 0, parse(f"{options},port={taken.getsockname()[1]}"))
        with structlog.testing.capture_logs() as logs:
            await node.start()
        assert [entry["log_level"] for entry in logs] == ["warning"] and reason in logs[0]["reason"]
        assert node.task is not None
        await node.task  # nothing to do
        node.finder.announce_soon()
        await node.finder.pause(0)
        report = node.finder.report()
        assert (report["on"], report["counts"]) == (False, {}) and reason in report["reason"]
        await node.close()


@pytest.mark.needs("netns")
async def test_multicast_without_a_route_goes_by_the_first_interface() -> None:
    with two_namespaces() as namespaces:
        namespaces.enter(0)
        one = Node(1, 1, parse(""))
        await one.start()
        namespaces.enter(1)
        two = Node(2, 0, parse(""))
        async with running(two):
            await until(lambda: two.homes == [(1, 5)])
            assert two.finder.addresses(1, 7)[1] == Address("10.77.0.1", 4701)
        await one.close()


# -- two daemons ------------------------------------------------------------------------------------------------------


async def find(both: Cluster, options: MountOptions) -> tuple[Any, Any]:
    """Start the announcements of both daemons; return (home, node)."""
    found = []
    for daemon, port in ((both.home, both.port), (both.node, 9)):
        daemon.options = replace(options, timeouts=daemon.options.timeouts)
        await daemon._start_finder(KEYS, Address("127.0.0.1", port))
        found.append(daemon)
    return found[0], found[1]


async def test_a_node_finds_a_home_whose_slot_has_no_address_by_its_announcement(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        both.home.lockspace.write_slot(replace(both.home.held.record, counter=3))  # type: ignore[union-attr]
        client = ClientRole(both.node)
        with pytest.raises(IoFailure, match="no address"):
            await client.connect()
        _home, node = await find(both, local())
        async with asyncio.timeout(10):
            await node.pause(3600)
        assert await node._become_client(client)
        assert both.home.peers[2].identity.slot == 2


async def test_a_node_finds_the_home_through_its_slot_when_datagrams_are_blocked(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        _home, node = await find(both, parse(f"peer=127.0.0.2,port={free_port()}"))  # nobody listens there
        client = ClientRole(node)
        assert await node._become_client(client)
        report = node.finder.report()
        assert report["heard"] == [] and report["counts"].get("accepted") is None
        assert both.home.peers[2].identity.slot == 2


async def test_a_later_home_that_announces_itself_ends_the_connection_to_one_that_hangs(tmp_path: Path) -> None:
    async with cluster(tmp_path) as both:
        _home, node = await find(both, local())
        client = ClientRole(node)
        assert await node._become_client(client)
        quiet, followed = node.fuse, []
        client.follow = lambda: followed.append(True) or asyncio.sleep(0)  # type: ignore[method-assign,func-returns-value]
        frozen = quiet.calls.count("freeze")
        node._on_home_announced(3, 5)  # not later than ours
        assert not followed and quiet.calls.count("freeze") == frozen
        node._on_home_announced(3, 6)
        assert followed == [True] and quiet.calls.count("freeze") == frozen + 1 and not node.serving
        node._on_home_announced(3, 7)  # following already
        assert followed == [True]
