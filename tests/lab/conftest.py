"""Fixtures of the lab tests: a cluster a module, a native XFS for reference, a fresh folder a test."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from labkit import NATIVE, Lab, NativeXfs, missing_capability, running_lab, scratch_dir

_numbers = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker of tests that no native stand-in can serve."""
    config.addinivalue_line("markers", "needs_lab: uses lab commands; deselected when MXFS_TEST_NATIVE=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With MXFS_TEST_NATIVE=1, leave out the tests that need lab commands."""
    if not NATIVE:
        return
    dropped = [item for item in items if item.get_closest_marker("needs_lab")]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker("needs_lab")]


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A cluster for one module; module variables LAB_NODES, LAB_SIZE and LAB_FENCING change its shape.

    Its teardown runs `lab down`, which ends with xfs_repair -n: a complaint fails the module.
    """
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    count = getattr(request.module, "LAB_NODES", 3)
    size = getattr(request.module, "LAB_SIZE", "2G")
    fencing = getattr(request.module, "LAB_FENCING", "lease")
    with running_lab(count=count, size=size, fencing=fencing) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def native_xfs() -> Iterator[Path]:
    """The root of a native XFS mount, for the errno and the stat fields that Linux itself gives."""
    reason = missing_capability()
    if reason:
        pytest.skip(reason)
    folder = scratch_dir("mxfs-native-")
    volume = NativeXfs(folder)
    try:
        yield volume.root
    finally:
        volume.close()
    shutil.rmtree(folder)


@pytest.fixture
def work(lab: Lab, request: pytest.FixtureRequest) -> dict[str, Path]:
    """A new folder of the volume as each node sees it, by node name; made on the first node."""
    name = f"t{next(_numbers)}"
    os.mkdir(lab["n1"] / name, 0o755)
    (lab["n1"] / name).chmod(0o755)
    return {node: root / name for node, root in lab.nodes.items()}
