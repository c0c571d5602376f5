"""Modules of a package whose ``__init__`` imports far more than we need.

Importing anything of pyroute2 runs its ``__init__``, which imports all of its 160 modules: a third of the time that a
daemon or a FUSE layer takes to start. We need its netlink codec, which stands alone.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType


@contextmanager
def bare(name: str) -> Iterator[None]:
    """While the with block imports modules of the package *name*, let an empty package of its folders stand for it.

    Who imports the package itself later gets it whole (``from NAME.MODULE import X`` for what was loaded before). Where
    it is loaded already, it is used as it is.
    """
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.submodule_search_locations is None:
        yield
        return
    package = ModuleType(name)
    package.__spec__ = spec
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]
