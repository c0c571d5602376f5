"""Machines that stand still, or do not hear each other while the disk is there for all: who goes on, who says so."""

import pytest
from channel import Command
from cluster import DEVICE, MOUNTPOINT, Cluster, Node
from storage import Storage

pytestmark = pytest.mark.timeout(420)

LIMIT_S = 120.0


def writers(cluster: Cluster, nodes: list[Node], folder: str) -> dict[Node, Command]:
    """Start a writer on each node, and wait until each has written some files."""
    nodes[0].must(f"mkdir {MOUNTPOINT}/{folder}")
    started = {node: node.writer(folder, node.name) for node in nodes}
    for writer in started.values():
        writer.wait_lines(10, 120)
    return started


def go_on(cluster: Cluster, started: dict[Node, Command], nodes: list[Node], what: str) -> None:
    """Wait until the writers of these nodes have written more; note how long that took."""
    counts = {node: len(started[node].lines()) for node in nodes}
    took = cluster.wait(
        lambda: all(len(started[node].lines()) > counts[node] + 3 for node in nodes), LIMIT_S, "writers go on"
    )
    cluster.note(f"{what}: the others' writers go on after {took:.0f} s")


def finish(started: dict[Node, Command], nodes: list[Node], looker: Node, folder: str) -> None:
    """End the writers of these nodes, none of which has seen an error; look at everything that any writer was told."""
    for node in nodes:
        started[node].signal(15)
        done = started[node].wait(90)
        assert done.code == 0, f"{node.name}: {done.err}"
    for node, writer in started.items():
        looker.check_files(folder, node.name, len(writer.lines()))


def is_out(cluster: Cluster, node: Node, writer: Command) -> None:
    """See that a node's writer was told, that the node says why, and that it takes part again when it mounts again."""
    done = writer.wait(LIMIT_S)
    assert done.code == 1, f"{node.name}: the writer ended with {done.code}: {done.err}"
    cluster.note(f"{node.name}, put out: its writer got {done.err.strip().partition(': ')[2]}")
    cluster.wait(lambda: not node.mounted, 60.0, f"the mount of {node.name} is dead")
    assert node.logged("this node is out", "the mount is dead", "lower mount was shut down"), node.log()


def test_a_home_that_stood_still_is_refused_by_the_disk(cluster: Cluster) -> None:
    """Its clocks stood still too: it cannot know that it is not the home any more. The reservation does.

    It had joined first, so tgtd kept the reservation with its registration, which is gone when it is fenced.
    """
    home, *others = cluster.heal("n1", "n2", "n3")
    started = writers(cluster, [home, *others], "paused")
    old = home.must("dmesg | wc -l")
    home.machine.pause()
    go_on(cluster, started, others, "home paused")
    new = cluster.home(others)
    assert new in others
    assert len(cluster.keys(new)) == 2
    assert isinstance(cluster.storage, Storage)
    strangers = cluster.storage.strangers()
    assert "type: Exclusive Access, all registrants" in cluster.reservation(new)
    go_on(cluster, started, others, "strangers at the target")
    for stranger in strangers:
        stranger.close()
    home.machine.resume()
    is_out(cluster, home, started[home])
    assert "reservation conflict" in home.must(f"dmesg | tail -n +{old.strip()}")
    assert len(cluster.keys(new)) == 2, "it has registered again by itself"
    finish(started, others, others[1], "paused")
    cluster.check()
    assert home.run(f"dd if={DEVICE} of=/dev/null bs=4096 count=1 iflag=direct").code != 0
    home.mount()
    assert home.must(f"ls {MOUNTPOINT}/paused | wc -l") == others[0].must(f"ls {MOUNTPOINT}/paused | wc -l")


def test_a_client_without_network_is_put_out(cluster: Cluster) -> None:
    home, client, other = cluster.heal("n1", "n2", "n3")
    started = writers(cluster, [home, client, other], "client-cut")
    client.machine.wire(False)
    took = cluster.wait(lambda: len(cluster.keys(home)) == 2, LIMIT_S, "the client is fenced")
    cluster.note(f"cable of a client pulled: fenced after {took:.0f} s")
    is_out(cluster, client, started[client])
    go_on(cluster, started, [home, other], "client without network")
    assert cluster.home([home, other]) is home
    finish(started, [home, other], other, "client-cut")
    cluster.check()
    client.machine.wire(True)
    client.mount()
    assert client.must(f"ls {MOUNTPOINT}/client-cut | wc -l") == home.must(f"ls {MOUNTPOINT}/client-cut | wc -l")


def test_a_home_without_network_lets_another_one_serve(cluster: Cluster) -> None:
    home, *others = cluster.heal("n1", "n2", "n3")
    started = writers(cluster, [home, *others], "home-cut")
    home.machine.wire(False)
    go_on(cluster, started, others, "cable of the home pulled")
    assert cluster.home(others) in others
    cluster.check()
    home.machine.wire(True)
    finish(started, others, others[0], "home-cut")
