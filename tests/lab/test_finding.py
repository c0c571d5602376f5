"""How nodes find each other: by announcements, and through the slots on the disk where datagrams do not pass."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from labkit import missing_capability, scratch_dir

from mxfs_proto.errors import MxfsError
from mxfsd.lab.lab import Lab

pytestmark = [pytest.mark.needs_lab, pytest.mark.needs("root", "fuse", "loop", "xfs", "netns")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    """Two nodes, n1 the home."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    lab = Lab(scratch_dir("mxfs-finding-") / "lab")
    lab.up(2, 1 << 30)
    yield lab
    lab.down(purge=True)
    lab.paths.root.rmdir()
    lab.paths.root.parent.rmdir()


def discovery(lab: Lab, name: str) -> dict[str, Any]:
    """Return what a node's status says of announcements."""
    node = next(node for node in lab.status()["nodes"] if node["name"] == name)
    found: dict[str, Any] = node["daemon"]["discovery"]
    return found


def shared(lab: Lab, text: str) -> None:
    """A file written on n1 is seen on n2, and the other way round."""
    one, two = lab.paths.mountpoint("n1"), lab.paths.mountpoint("n2")
    (one / text).write_text(text)
    assert (two / text).read_text() == text
    (two / text).unlink()
    assert not (one / text).exists()


def test_announcements_are_heard_and_counted(cluster: Lab) -> None:
    deadline = time.monotonic() + 20
    while not all(discovery(cluster, name)["counts"].get("accepted", 0) > 1 for name in ("n1", "n2")):
        assert time.monotonic() < deadline, [discovery(cluster, name) for name in ("n1", "n2")]
        time.sleep(0.1)
    assert discovery(cluster, "n1")["heard"] == [2] and discovery(cluster, "n2")["heard"] == [1]
    shared(cluster, "announced")


@pytest.mark.parametrize(
    ("extra", "on"),
    [("port=7999", True), ("multicast=ff02::1", False), ("peer=10.77.1.77", True)],
    ids=["other port", "no socket", "nobody there"],
)
def test_nodes_join_and_follow_a_move_without_announcements(cluster: Lab, extra: str, on: bool) -> None:
    cluster.stop("n2")
    cluster.start("n2", extra)
    shared(cluster, "joined")
    for target in ("n2", "n1"):
        cluster.move_home(target)
        shared(cluster, f"moved-to-{target}")
    found = discovery(cluster, "n2")
    assert found["on"] is on and (extra.startswith("peer") or found["counts"].get("accepted") is None)
    cluster.stop("n2")
    cluster.start("n2")


def test_a_node_joins_while_another_changes_the_root(cluster: Lab) -> None:
    """What a node asks its own mount before it is ready may have to be answered by it: nothing is cached for long."""
    changing, done = cluster.paths.mountpoint("n1") / "changing", threading.Event()

    def change() -> None:
        while not done.is_set():
            changing.write_text("now")
            changing.unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(6):
            cluster.stop("n2")
            cluster.start("n2")
    finally:
        done.set()
        thread.join()
    shared(cluster, "quiet")


def test_a_mount_that_the_home_refuses_ends_with_its_reason(cluster: Lab) -> None:
    cluster.stop("n2")
    begun = time.monotonic()
    with pytest.raises(MxfsError, match="other timeouts") as caught:
        cluster.start("n2", "timeouts=default")
    assert "\n" not in str(caught.value) and time.monotonic() - begun < 20
    cluster.start("n2")
    shared(cluster, "again")
