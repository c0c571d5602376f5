"""A part of a package is imported without the rest of it, and the package is whole for who wants it afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from mxfs_proto.barepackage import bare

LEAN = """
import sys
import mxfs_proto.netlink
print(sum(name.partition(".")[0] == "pyroute2" for name in sys.modules))
from pyroute2 import IPRoute
import pyroute2
from pyroute2.netlink import nla
print(IPRoute.__module__, pyroute2.__file__ is not None, mxfs_proto.netlink.nla is nla)
"""


def test_the_daemon_does_not_load_all_of_pyroute2() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    count, whole = done.stdout.splitlines()
    assert int(count) < 10
    assert whole.endswith("True True")


def test_an_init_is_not_run_and_a_loaded_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_one").mkdir()
    (tmp_path / "heavy_one/__init__.py").write_text("RAN = True\n")
    (tmp_path / "heavy_one/part.py").write_text("VALUE = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    with bare("heavy_one"):
        from heavy_one.part import VALUE  # type: ignore[import-not-found]
    assert VALUE == 5 and "heavy_one" not in sys.modules
    import heavy_one  # type: ignore[import-not-found]

    assert heavy_one.RAN
    with bare("heavy_one"):
        assert sys.modules["heavy_one"] is heavy_one
    assert sys.modules["heavy_one"] is heavy_one
    for name in ("heavy_one", "heavy_one.part"):
        monkeypatch.delitem(sys.modules, name)


def test_a_package_that_is_not_there_is_the_importer_s_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"), bare("no_such_package"):
        import no_such_package.part  # noqa: F401
