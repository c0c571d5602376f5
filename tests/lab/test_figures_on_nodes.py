"""Real work is counted: metrics scraped from the home agree with what another node did, and mxfs top shows it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from labkit import Lab, LabError, must, running_lab
from prometheus_client.parser import text_string_to_metric_families

from mxfsd import mountinfo, procs
from mxfsd.lab import net
from mxfsd.lab.state import Paths, load

pytestmark = [pytest.mark.needs("root", "fuse", "loop", "xfs", "netns"), pytest.mark.needs_lab]

PORT = 9188
MIB = 1 << 20
SCRAPE = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{PORT}/metrics', timeout=5).read().decode())"
CONNECT = f"import socket; socket.create_connection(('{net.address(2)}', {PORT}), 5)"


class Scrape:
    """The samples of one answer of a node's daemon."""

    def __init__(self, lab: Lab, node: str) -> None:
        families = text_string_to_metric_families(lab.execute(node, sys.executable, "-c", SCRAPE))
        self.samples = [sample for family in families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        found = [s.value for s in self.samples if s.name == f"mxfs_{name}" and labels.items() <= s.labels.items()]
        return float(sum(found))

    def operations(self, op: str) -> float:
        return self("operation_duration_seconds_count", node="n3", op=op)


def top(lab: Lab, node: str, *words: str) -> str:
    command = [sys.executable, "-m", "mxfsd.cli.mxfs", "top", "--interval", "1", "--count", "2"]
    return must([*command, "--run-dir", lab.folder / ".lab" / node / "run", *words], 60).stdout


def started_with_metrics(lab: Lab, node: str) -> None:
    lab.stop(node)
    lab.start(node, options=f"metrics={PORT}")


@contextmanager
def files_made(folder: Path) -> Iterator[None]:
    """Another process makes file after file meanwhile."""
    endless = "import itertools, sys\nfor i in itertools.count(): open(f'{sys.argv[1]}/{i}', 'x').close()"
    worker = subprocess.Popen([sys.executable, "-c", endless, str(folder)])
    try:
        yield
        assert worker.poll() is None, "it ended by itself"
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.timeout(280)
def test_what_the_home_counts_is_what_was_done() -> None:
    with running_lab() as lab:
        started_with_metrics(lab, "n2")
        lab.move_home("n2")
        before = Scrape(lab, "n2")
        assert (before("home"), before("serving"), before("connected_nodes")) == (1, 1, 2)
        assert (before("takeovers_total", cause="free"), before("takeovers_total", cause="fenced")) == (1, 0)

        base = lab["n3"] / "work"
        base.mkdir()
        for number in range(7):
            (base / f"d{number}").mkdir()
        for number in range(50):
            (base / f"f{number}").touch()
        for number in range(20):
            (base / f"f{number}").unlink()
        with open(base / "data", "wb") as file:
            for _ in range(3):
                file.write(bytes(MIB))
            os.fsync(file.fileno())
        assert (lab["n1"] / "work" / "data").stat().st_size == 3 * MIB

        after = Scrape(lab, "n2")
        done = {op: after.operations(op) - before.operations(op) for op in ("MKDIR", "CREATE", "UNLINK")}
        assert done == {"MKDIR": 8, "CREATE": 51, "UNLINK": 20}
        assert after.operations("FSYNC") > before.operations("FSYNC")
        assert after("written_bytes_total", node="n3") - before("written_bytes_total", node="n3") == 3 * MIB
        assert after("written_bytes_total", node="n1") == before("written_bytes_total", node="n1")
        assert after("log_forces_total") > before("log_forces_total")
        assert after("basts_total", node="n3") > before("basts_total", node="n3"), "n1 looked at what n3 had written"
        assert after("locks_held", node="n3") > 0
        assert after("unstable_files", node="n3") == 0
        assert 0 <= after("lease_age_seconds") < 5
        every = after("operation_duration_seconds_bucket", node="n3", op="MKDIR", le="+Inf")
        assert every == after.operations("MKDIR")

        (base / "more").mkdir()
        with files_made(base / "more"):
            seen = [json.loads(line) for line in top(lab, "n2", "--json").splitlines()]
            page = top(lab, "n2")
        assert [record["gap"] for record in seen] == ["", ""]
        for record in seen:
            (row,) = [node for node in record["nodes"] if node["name"] == "n3"]
            assert row["rates"]["operations"] > 5
            assert record["operations"][0]["op"] == "CREATE"
        assert page.count("home n2, epoch") == 2
        assert page.count("\ncreate ") == 2
        assert "operations are counted at the home: mxfs top on n2" in top(lab, "n1")

        metrics_stay_on_loopback(lab)
        metrics_come_back_with_the_daemon(lab)
        a_port_that_is_taken_fails_the_mount(lab)


def metrics_stay_on_loopback(lab: Lab) -> None:
    with pytest.raises(LabError, match="ConnectionRefusedError"):
        lab.execute("n1", sys.executable, "-c", CONNECT)


def metrics_come_back_with_the_daemon(lab: Lab) -> None:
    lab.crash("n2", "daemon")
    (lab["n2"] / "again").touch()

    def served() -> bool:
        with suppress(LabError):
            return Scrape(lab, "n2")("info", node="n2") == 1 and Scrape(lab, "n2")("serving") == 1
        return False

    assert procs.wait_until(served, 30)


def a_port_that_is_taken_fails_the_mount(lab: Lab) -> None:
    lab.stop("n3")
    state = load(Paths(lab.folder))
    space = net.path_of(net.namespace(state.id, "n3"))
    listen = (
        f"import socket, time; s = socket.create_server(('127.0.0.1', {PORT})); print(s, flush=True); time.sleep(99)"
    )
    command = ["nsenter", f"--net={space}", sys.executable, "-c", listen]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline()
            begun = time.monotonic()
            with pytest.raises(LabError) as caught:
                lab.start("n3", options=f"metrics={PORT}")
            assert time.monotonic() - begun < 15
        finally:
            other.kill()
    assert f"metrics=127.0.0.1:{PORT}: another program, or another volume, has this port" in str(caught.value)
    assert mountinfo.at(str(lab.folder / "n3")) is None
    assert not list((lab.folder / ".lab" / "n3" / "run").glob("*/mount.json"))
    lab.start("n3", options=f"metrics={PORT}")
    assert Scrape(lab, "n3")("home") == 0
