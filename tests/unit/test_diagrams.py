"""The drawings in docs/ are what their sources give."""

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "diagrams" / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["architecture", "takeover"])
def test_drawn_anew_it_is_the_same(draw: ModuleType, name: str) -> None:
    found = (DOCS / f"{name}.svg").read_text()
    assert found == draw.draw(name), "run python docs/diagrams/draw.py"
    ElementTree.fromstring(found)
    assert set(draw.DRAWINGS) == {path.stem for path in DOCS.glob("*.svg")}


def test_a_line_that_makes_no_sense_is_named(draw: ModuleType) -> None:
    for source, how in (("circle a", draw.boxes), ("actor a A\nb: what b does", draw.messages)):
        with pytest.raises(draw.SourceError):
            how(source)
