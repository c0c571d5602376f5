"""Fixtures: the files that guests start from and one cluster of three guests for all tests that can share it.

A guest takes 20 to 30 s to start without hardware help, so only what a test killed is started again, by the next test
that needs it (``Cluster.heal``). A failed test's report has the guests' consoles and the daemons' logs.
"""

from collections.abc import Iterator
from pathlib import Path

import cluster as clusters
import image
import pytest

NODES = 3
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
    running = getattr(item, "funcargs", {}).get("cluster")
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


@pytest.fixture(scope="session")
def cluster(boot: image.Boot, pytestconfig: pytest.Config) -> Iterator[clusters.Cluster]:
    """Three guests with one disk. Its end unmounts everywhere and runs xfs_repair -n on the image."""
    folder = clusters.scratch()
    running = None
    try:
        running = clusters.Cluster(folder, boot, NODES)
        yield running
        running.finish()
    finally:
        if running is not None:
            pytestconfig.stash.setdefault(TIMES, []).extend(running.times)
            running.close()
        clusters.remove(folder)


TIMES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how long boots, mounts and takeovers took."""
    for line in config.stash.get(TIMES, []):
        terminalreporter.write_line(f"vm: {line}")
