"""Lock modes against the published VMS matrix, and the sequences of successive homes."""

import re
from itertools import product
from pathlib import Path

import pytest

from mxfs_proto.modes import LockMode, compatible, covers
from mxfsd.core.epochs import first_seq

MATRIX = """
    NL CR CW PR PW EX
NL   1  1  1  1  1  1
CR   1  1  1  1  1  0
CW   1  1  1  0  0  0
PR   1  1  0  1  0  0
PW   1  1  0  0  0  0
EX   1  0  0  0  0  0
"""
"""__dlm_compat_matrix of fs/dlm/lock.c."""
PAIRS = list(product(LockMode, LockMode))


def test_compatibility_is_the_vms_matrix() -> None:
    head, *rows = MATRIX.strip("\n").splitlines()
    columns = head.split()
    for row in rows:
        name, *cells = row.split()
        for column, cell in zip(columns, cells, strict=True):
            assert compatible(LockMode[name], LockMode[column]) == (cell == "1"), (name, column)


def test_a_mode_covers_what_conflicts_with_no_more() -> None:
    """A holder of *held* may act as *needed* where whoever is compatible with *held* is so with *needed* too."""
    for held, needed in PAIRS:
        allows = all(compatible(needed, other) for other in LockMode if compatible(held, other))
        assert covers(held, needed) == allows, (held, needed)


def test_numbers_are_those_of_the_kernel() -> None:
    header = Path("/usr/include/linux/dlmconstants.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    numbers = dict(re.findall(r"#define DLM_LOCK_(NL|CR|CW|PR|PW|EX)\s+(\d)", header.read_text()))
    assert numbers == {mode.name: str(int(mode)) for mode in LockMode}


def test_grant_sequences_of_homes_do_not_overlap() -> None:
    for epoch in (0, 1, 2, 1000, 2**24 - 2):
        room = first_seq(epoch + 1) - first_seq(epoch)
        assert room >= 10**12, "a home of years has that many grants at most"
        assert first_seq(epoch + 1) < 2**64, "it fits the u64 of the wire"
