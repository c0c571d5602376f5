"""Test habits: capabilities and skips, unexpected error logs fail a test, hung tests show their stacks.

A test that needs something of the machine says so with ``@pytest.mark.needs("root", "fuse", ...)``; where it is
missing the test is skipped with the reason. With CI=true every test must run: the capabilities in ``REQUIRED`` must
be there, and a skip is an error unless it comes from a capability outside ``REQUIRED`` that is truly absent.
"""

import ctypes
import faulthandler
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest

HANG_DUMP_S = 240
"""All stacks are written after this long in one test; pytest-timeout ends the test at its own, later limit."""

_IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _tool(name: str) -> str | None:
    return None if shutil.which(name) else f"{name} is not installed"


def _filesystem(name: str) -> str | None:
    known = Path("/proc/filesystems").read_text().split()
    return None if name in known else f"this kernel has no {name}"


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _fuse() -> str | None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse"
    return _filesystem("fuse")


def _loop() -> str | None:
    return None if os.access("/dev/loop-control", os.R_OK | os.W_OK) else "no access to /dev/loop-control"


def _xfs() -> str | None:
    return _filesystem("xfs") or _tool("mkfs.xfs") or _tool("xfs_repair")


def _tgt() -> str | None:
    try:
        ctypes.CDLL("libiscsi.so.7")
    except OSError:
        return "libiscsi is not installed"
    return _tool("tgtd") or _tool("tgtadm")


def _netns() -> str | None:
    return _root() or _tool("ip") or (None if Path("/proc/self/ns/net").exists() else "no namespaces")


def _native() -> str | None:
    """What test_pyfuse3.py shows to be so."""
    other = os.environ.get("MXFS_TEST_CHANNEL") == "pyfuse3"
    return "libfuse's Python binding has no such requests (MXFS_TEST_CHANNEL=pyfuse3)" if other else None


def _tmpfile() -> str | None:
    release = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
    return _native() or (None if release >= (6, 1) else "Linux knows O_TMPFILE on FUSE from 6.1 on")


def _vm() -> str | None:
    if os.environ.get("MXFS_TEST_VM") != "1":
        return "takes virtual machines: make test-vm"
    reason = _tool("qemu-system-x86_64") or _tool("iscsid") or _tool("tgtd") or _tool("sg_persist") or _tool("busybox")
    if reason is None and not (Path(sys.executable).parent / "virtme-run").exists():
        reason = "virtme-ng is not installed"
    if reason is None and not any(
        Path(f"/lib/modules/{kernel.name.removeprefix('vmlinuz-')}/modules.dep").exists()
        for kernel in Path("/boot").glob("vmlinuz-*")
    ):
        reason = "no kernel with modules is installed in /boot"
    return f"{reason}: make test-vm installs what virtual machines need" if reason else None


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "root": _root,
    "fuse": _fuse,
    "loop": _loop,
    "xfs": _xfs,
    "netns": _netns,
    "tgt": _tgt,
    "vm": _vm,
    "native": _native,
    "tmpfile": _tmpfile,
    "fio": lambda: _tool("fio"),
    "setfacl": lambda: _tool("setfacl"),
    "setfattr": lambda: _tool("setfattr"),
    "groff": lambda: _tool("groff"),
    "kvm": lambda: None if os.access("/dev/kvm", os.R_OK | os.W_OK) else "no access to /dev/kvm",
    "systemd": lambda: None if Path("/run/systemd/system").is_dir() else "systemd does not run here",
}
"""Name → a check that returns None, or why this machine cannot."""

REQUIRED = frozenset({"root", "fuse", "loop", "xfs", "netns", "tgt", "fio", "setfacl", "setfattr", "vm"})
"""What a machine that runs CI must have."""

_lawful_skips = pytest.StashKey[bool]()
_suspect_skips: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "needs(*names): capabilities of the machine that the test needs")
    config.addinivalue_line("markers", "error_logs: the test provokes log lines of level error")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose machine lacks what it needs; in CI fail it when CI machines must have that."""
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            reason = CAPABILITIES[name]()
            if reason is None:
                continue
            if _IN_CI and name in REQUIRED:
                pytest.fail(f"CI machines must have {name}: {reason}", pytrace=False)
            item.stash[_lawful_skips] = True
            pytest.skip(f"needs {name}: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI, turn any other skip into a failure: what this machine can run must run."""
    report = yield
    if _IN_CI and report.skipped and not hasattr(report, "wasxfail") and not item.stash.get(_lawful_skips, False):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped in CI: {_reason(report.longrepr)}"
    return report


def _reason(longrepr: object) -> str:
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember modules that skip themselves at import (importorskip, module-level skip)."""
    if _IN_CI and report.skipped:
        _suspect_skips.append(f"{report.nodeid}: {_reason(report.longrepr)}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A module that skipped itself fails the CI run."""
    if _suspect_skips and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the modules that skipped themselves."""
    for line in _suspect_skips:
        terminalreporter.write_line(f"ERROR skipped in CI at import: {line}", red=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Write the stacks of every thread when a test hangs, even in a system call that no signal ends."""
    faulthandler.dump_traceback_later(HANG_DUMP_S, file=sys.__stderr__)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


class _Recorder(logging.Handler):
    """Collects error lines of structlog (as a processor) and of the standard library (as a handler)."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")

    def __call__(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if method in ("error", "critical", "exception", "fatal"):
            self.lines.append(", ".join(f"{key}={value}" for key, value in event.items()))
        return event


@pytest.fixture(autouse=True)
def log_guard(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Fail a test that logs an error, unless it is marked ``error_logs``; gives the error lines so far.

    A test that expects certain lines may also read them with structlog.testing.capture_logs.
    """
    import structlog

    recorder = _Recorder()
    structlog.configure(
        processors=[recorder, structlog.processors.KeyValueRenderer(key_order=["event"])],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.PrintLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    handlers = list(root.handlers)
    root.addHandler(recorder)
    try:
        yield recorder.lines
    finally:
        root.handlers[:] = handlers
        structlog.reset_defaults()
    if recorder.lines and request.node.get_closest_marker("error_logs") is None:
        pytest.fail("unexpected error logs:\n" + "\n".join(recorder.lines), pytrace=False)
