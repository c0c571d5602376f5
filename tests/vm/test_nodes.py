"""Three machines with one iSCSI disk: what a user does on a good day, and what is left when one loses its power."""

import re

import pytest
from cluster import DEVICE, MOUNTPOINT, Cluster

pytestmark = pytest.mark.timeout(420)

TAKEOVER_S = 90.0
"""With timeouts=default a dead home is replaced after 17 s, slow machines not counted."""


def test_files_are_shared(cluster: Cluster) -> None:
    nodes = cluster.heal("n1", "n2", "n3")
    nodes[0].must(f"mkdir {MOUNTPOINT}/day")
    for node in nodes:
        node.must(f"echo from {node.name} >{MOUNTPOINT}/day/{node.name}")
    for node in nodes:
        text = node.must(f"cat {MOUNTPOINT}/day/n1 {MOUNTPOINT}/day/n2 {MOUNTPOINT}/day/n3")
        assert text == "from n1\nfrom n2\nfrom n3\n"
    nodes[1].must(f"echo more >>{MOUNTPOINT}/day/n1; mv {MOUNTPOINT}/day/n2 {MOUNTPOINT}/day/moved")
    nodes[2].must(f"rm {MOUNTPOINT}/day/n3")
    for node in nodes:
        assert node.must(f"ls {MOUNTPOINT}/day") == "moved\nn1\n"
        assert node.must(f"cat {MOUNTPOINT}/day/n1") == "from n1\nmore\n"
    cluster.check()


def test_the_disk_lets_in_these_nodes_and_nobody_else(cluster: Cluster) -> None:
    """sg_persist sees one key a node and a reservation of type 8; a host that has not mounted cannot read."""
    nodes = cluster.heal("n1", "n2")
    keys = cluster.keys(nodes[0])
    assert len(set(keys)) == len(keys) == 2
    assert re.search(r"type: Exclusive Access, all registrants", cluster.reservation(nodes[0]))
    stranger = cluster["n3"]
    done = stranger.run(f"dd if={DEVICE} of=/dev/null bs=4096 count=1 iflag=direct")
    assert done.code != 0 and "Invalid exchange" in done.err
    assert "conflict" in stranger.must("dmesg | tail -n 5")
    refused = stranger.run(f"mkfs.mxfs -f {DEVICE}")
    assert refused.code != 0 and len(refused.err.splitlines()) == 1, refused.err
    stranger.mount()
    assert len(cluster.keys(nodes[0])) == 3


def test_the_home_loses_its_power(cluster: Cluster) -> None:
    """Another node takes over, the dead one is shut out, and whatever any node was told is durable is there."""
    home, *others = cluster.heal("n1", "n2", "n3")
    home.must(f"mkdir {MOUNTPOINT}/home-dies")
    before = cluster.keys(others[0])
    writers = {node: node.writer("home-dies", node.name) for node in (home, *others)}
    for writer in writers.values():
        writer.wait_lines(15, 120)
    home.machine.power_off()
    counts = {node: len(writers[node].lines()) for node in others}
    took = cluster.wait(
        lambda: all(len(writers[node].lines()) > counts[node] + 3 for node in others), TAKEOVER_S, "writers go on"
    )
    cluster.note(f"power of the home cut: writers on both others go on after {took:.0f} s")
    assert cluster.home(others) in others
    after = cluster.keys(others[0])
    assert len(after) == 2 and set(after) < set(before)
    cluster.check()
    for node in others:
        writers[node].signal(15)
        done = writers[node].wait(60)
        assert done.code == 0, done.err
    for node, writer in writers.items():
        others[0].check_files("home-dies", node.name, len(writer.lines()))
    assert others[1].logged("home fenced") or others[0].logged("home fenced")


def test_a_client_loses_its_power(cluster: Cluster) -> None:
    """It boots and mounts again first (the last test killed it); then a client dies in the middle of its work."""
    home, client, other = cluster.heal("n1", "n2", "n3")
    home.must(f"mkdir {MOUNTPOINT}/client-dies")
    before = cluster.keys(home)
    assert len(before) == 3
    writers = {node: node.writer("client-dies", node.name) for node in (client, other, home)}
    for writer in writers.values():
        writer.wait_lines(15, 120)
    client.machine.power_off()
    took = cluster.wait(lambda: len(cluster.keys(home)) == 2, TAKEOVER_S, "the dead client is shut out")
    cluster.note(f"power of a client cut: its key is gone after {took:.0f} s")
    for node in (other, home):
        writers[node].wait_lines(len(writers[node].lines()) + 5, 60)
        writers[node].signal(15)
        done = writers[node].wait(60)
        assert done.code == 0, done.err
    assert cluster.home([home, other]) is home
    for node, writer in writers.items():
        other.check_files("client-dies", node.name, len(writer.lines()))
    # What it had open is free again.
    home.must(f"echo x >>{MOUNTPOINT}/client-dies/{client.name}-0 && rm {MOUNTPOINT}/client-dies/{client.name}-1", 90)
    cluster.check()
