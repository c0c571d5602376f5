"""Fixtures: the files that guests start from, and a cluster for all tests that can share it.

A guest takes 20 to 30 s to start without hardware help, so only what a test killed is started again, by the next test
that needs it (``Cluster.heal``). A failed test's report has the guests' consoles and the daemons' logs.
"""

from collections.abc import Iterator
from pathlib import Path

import cluster as clusters
import image
import pytest

NODES, LIO_NODES = 3, 2
_DIR = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs the same of the machine."""
    for item in items:
        if item.path.is_relative_to(_DIR):
            item.add_marker(pytest.mark.needs("root", "netns", "vm"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the guests' logs to the report of a test that failed."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    running = arguments.get("cluster") or arguments.get("lio")
    if report.failed and running is not None:
        report.sections.append(("guests", running.logs()))
    return report


@pytest.fixture(scope="session")
def boot() -> Iterator[image.Boot]:
    """Kernel, initramfs and disk image of the guests."""
    folder = clusters.scratch()
    try:
        yield image.prepare(folder)
    finally:
        clusters.remove(folder)


class Running:
    """The cluster that runs. There is one at a time: the processors are few."""

    def __init__(self, boot: image.Boot, times: list[str]) -> None:
        self._boot = boot
        self._times = times
        self._lio = False
        self._folder: Path | None = None
        self._cluster: clusters.Cluster | None = None

    def get(self, *, lio: bool) -> clusters.Cluster:
        """Return one with this target; one with the other is ended first, with its last checks."""
        if self._cluster is not None and self._lio is not lio:
            self.end()
        if self._cluster is None:
            self._folder = clusters.scratch()
            self._cluster = clusters.Cluster(self._folder, self._boot, LIO_NODES if lio else NODES, lio=lio)
            self._lio = lio
        return self._cluster

    def end(self) -> None:
        """Unmount everywhere, and run xfs_repair -n on the image."""
        cluster, self._cluster = self._cluster, None
        try:
            if cluster is not None:
                cluster.finish()
        finally:
            if cluster is not None:
                self._times.extend(cluster.times)
                cluster.close()
            if self._folder is not None:
                clusters.remove(self._folder)


@pytest.fixture(scope="session")
def times(pytestconfig: pytest.Config) -> list[str]:
    """Lines for the summary."""
    return pytestconfig.stash.setdefault(TIMES, [])


@pytest.fixture(scope="session")
def running(boot: image.Boot, times: list[str]) -> Iterator[Running]:
    """What the tests share."""
    holder = Running(boot, times)
    yield holder
    holder.end()


@pytest.fixture
def cluster(running: Running) -> clusters.Cluster:
    """Three guests with one disk at tgtd."""
    return running.get(lio=False)


@pytest.fixture
def lio(running: Running) -> clusters.Cluster:
    """Two guests with one disk at the kernel's own target, in a guest too."""
    return running.get(lio=True)


TIMES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long boots, mounts and takeovers took."""
    for line in config.stash.get(TIMES, []):
        terminalreporter.write_line(f"vm: {line}")
