"""proto/ and mxfsd/core/ do no I/O and read no clock: nothing they import, directly or through each other, does."""

import ast
from pathlib import Path

import mxfs_proto
import mxfsd.core

FORBIDDEN = {"asyncio", "socket", "os", "time", "random", "secrets", "threading", "subprocess", "select", "ssl"}
ROOTS = {"mxfs_proto": Path(mxfs_proto.__path__[0]), "mxfsd.core": Path(mxfsd.core.__path__[0])}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "__import__", path
    return names


def modules() -> list[Path]:
    found = [path for root in ROOTS.values() for path in sorted(root.rglob("*.py"))]
    assert len(found) > 10
    return found


def test_nothing_impure_is_imported() -> None:
    impure = {(path.name, name) for path in modules() for name in imports(path) if name.split(".")[0] in FORBIDDEN}
    assert not impure


def test_our_own_impure_modules_are_not_imported() -> None:
    ours = {(path.name, name) for path in modules() for name in imports(path) if name.startswith(("mxfs", "mxfsd"))}
    strays = {(where, name) for where, name in ours if not name.startswith(tuple(ROOTS))}
    assert not strays


def test_the_walk_sees_what_it_must_refuse(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    import time\n    from os import path\n")
    assert imports(bad) & FORBIDDEN == {"time", "os"}
