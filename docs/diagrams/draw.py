"""Draws docs/*.svg from docs/diagrams/*.txt: ``python docs/diagrams/draw.py``. Needs the standard library alone.

A source says in its first line what its lines mean. The drawings are made by nothing but this and checked in beside the
documents; a unit test compares them.
"""

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_STYLE = (
    "text{font:13px sans-serif;fill:#222}.t{font-size:16px;font-weight:bold}.s{font-size:11px;fill:#444}"
    ".h{font-weight:bold;fill:#245}rect{fill:#fff;stroke:#456}.b{fill:#eef4fb}.f{fill:#fafafa;stroke:#999}.c{fill:#fafafa;stroke:none}"
    ".p{fill:#e3ecd9;stroke:none}.n{fill:#fff7dc;stroke:#b90}line,path{stroke:#456;fill:none}.l{stroke:#bbb}"
)
_ARROW = (
    '<marker id="a" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto"><path d="M1 1L8 4L1 7"/></marker>'
)
_CELL_W, _CELL_H, _GAP = 100, 34, 9
_LINE = 16


class SourceError(Exception):
    """A line that makes no sense."""


@dataclass(frozen=True)
class Area:
    """A rectangle, in pixels."""

    x: int
    y: int
    width: int
    height: int

    @property
    def middle(self) -> tuple[int, int]:
        """Its centre."""
        return self.x + self.width // 2, self.y + self.height // 2


def lines_of(source: str) -> list[str]:
    """Return the lines that count."""
    return [line.rstrip() for line in source.splitlines() if line.strip() and not line.startswith("#")]


def text(x: int, y: int, words: str, kind: str = "", anchor: str = "middle") -> str:
    """Return one line of text; *y* is its middle."""
    made = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y + 4}" text-anchor="{anchor}"{made}>{escape(words)}</text>'


def rect(area: Area, kind: str) -> str:
    """Return a rectangle."""
    return f'<rect class="{kind}" x="{area.x}" y="{area.y}" width="{area.width}" height="{area.height}" rx="4"/>'


def line(x1: int, y1: int, x2: int, y2: int, kind: str = "", *, arrow: bool = False) -> str:
    """Return a line."""
    made = f' class="{kind}"' if kind else ""
    end = ' marker-end="url(#a)"' if arrow else ""
    return f'<line{made} x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"{end}/>'


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return the drawing."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    back = f'<rect width="{width}" height="{height}" style="fill:#fff;stroke:none"/>'
    inside = [f"<title>{escape(title)}</title><style>{_STYLE}</style><defs>{_ARROW}</defs>", back]
    return "\n".join([head, *inside, text(width // 2, 18, title, "t"), *parts, "</svg>", ""])


# -- boxes on a grid ---------------------------------------------------------------------------------------------------


def boxes(source: str) -> str:
    """Draw frames, boxes and the lines between them."""
    title, areas = "", {}
    frames: list[str] = []
    shapes: list[str] = []
    links: list[tuple[str, str, str]] = []
    for row in lines_of(source):
        word, _, rest = row.partition(" ")
        if word == "title":
            title = rest
        elif word in ("box", "frame"):
            name, column, line_, columns, rows, words = rest.split(None, 5)
            area = _area(int(column), int(line_), int(columns), int(rows), inset=_GAP if word == "box" else 2)
            areas[name] = area
            if word == "frame":
                frames.append(rect(area, "f"))
                back = Area(area.x + 4, area.y + 4, len(words) * 8, 18)
                shapes += [rect(back, "c"), text(area.x + 8, area.y + 13, words, "h", "start")]
            else:
                shapes += [rect(area, "b"), *_inside(area, words)]
        elif word == "line":
            first, second, *words_ = rest.split(None, 2)
            links.append((first, second, words_[0] if words_ else ""))
        else:
            raise SourceError(row)
    drawn = [part for first, second, words in links for part in _link(areas[first], areas[second], words)]
    width = max(area.x + area.width for area in areas.values()) + 10
    height = max(area.y + area.height for area in areas.values()) + 10
    return page(width, height, title, [*frames, *drawn, *shapes])


def _area(column: int, row: int, columns: int, rows: int, inset: int) -> Area:
    x, y = 8 + column * _CELL_W + inset, 32 + row * _CELL_H + inset // 2
    return Area(x, y, columns * _CELL_W - 2 * inset, rows * _CELL_H - inset)


def _inside(area: Area, words: str) -> list[str]:
    x, y = area.middle
    parts = words.split("|")
    top = y - (len(parts) - 1) * _LINE // 2
    return [text(x, top + number * _LINE, part, "s" if number else "") for number, part in enumerate(parts)]


def _link(one: Area, other: Area, words: str) -> list[str]:
    """A straight line from edge to edge: down where one lies above the other, else across."""
    (x1, y1), (x2, y2) = one.middle, other.middle
    if one.y + one.height <= other.y:
        y1, y2 = one.y + one.height, other.y
    elif other.y + other.height <= one.y:
        y1, y2 = one.y, other.y + other.height
    else:
        x1, x2 = (one.x + one.width, other.x) if x1 < x2 else (one.x, other.x + other.width)
        y1 = y2 = (max(one.y, other.y) + min(one.y + one.height, other.y + other.height)) // 2
    made = [line(x1, y1, x2, y2)]
    if words:
        x, y = (x1 + x2) // 2, (y1 + y2) // 2
        half = len(words) * 3 + 4
        made += [f'<rect class="p" style="fill:#fff" x="{x - half}" y="{y - 8}" width="{2 * half}" height="16"/>']
        made += [text(x, y, words, "s")]
    return made


# -- messages in time --------------------------------------------------------------------------------------------------

_FIRST_X, _APART = 80, 190


def messages(source: str) -> str:
    """Draw what passes between actors, from top to bottom."""
    title = ""
    actors: dict[str, tuple[int, str]] = {}
    parts: list[str] = []
    y = 92
    rows = lines_of(source)
    width = 2 * _FIRST_X + (sum(row.startswith("actor ") for row in rows) - 1) * _APART
    for row in rows:
        if row.startswith("title "):
            title = row[6:]
        elif row.startswith("actor "):
            _, name, words = row.split(None, 2)
            actors[name] = (_FIRST_X + len(actors) * _APART, words)
        elif row.startswith("== "):
            parts += [rect(Area(8, y - 11, width - 16, 22), "p"), text(16, y, row[3:], "h", "start")]
            y += 30
        elif " -> " in row.split(":")[0]:
            ends, _, words = row.partition(": ")
            first, second = (actors[name][0] for name in ends.split(" -> "))
            parts += [line(first, y + 8, second, y + 8, arrow=True)]
            parts += _label((first + second) // 2, y, words)
            y += 30
        else:
            name, found, words = row.partition(": ")
            if not found or name not in actors:
                raise SourceError(row)
            pieces = words.split("|")
            half = max(map(len, pieces)) * 3 + 12
            x = min(max(actors[name][0], half + 8), width - half - 8)
            box = Area(x - half, y - 10, 2 * half, len(pieces) * _LINE + 6)
            parts += [rect(box, "n"), *(text(x, y + n * _LINE + 1, piece, "s") for n, piece in enumerate(pieces))]
            y += box.height + 12
    lives: list[str] = []
    for x, words in actors.values():
        lives += [
            line(x, 74, x, y, "l"),
            rect(Area(x - 62, 34, 124, 40), "b"),
            *_inside(Area(x - 62, 34, 124, 40), words),
        ]
    return page(width, y + 10, title, [*lives, *parts])


def _label(x: int, y: int, words: str) -> list[str]:
    half = len(words) * 3 + 3
    back = f'<rect style="fill:#fff;stroke:none" x="{x - half}" y="{y - 8}" width="{2 * half}" height="14"/>'
    return [back, text(x, y - 1, words, "s")]


DRAWINGS = {"architecture": boxes, "takeover": messages}


def draw(name: str) -> str:
    """Return the drawing of docs/diagrams/NAME.txt."""
    return DRAWINGS[name]((FOLDER / f"{name}.txt").read_text(encoding="utf-8"))


def main() -> int:
    """Write every drawing."""
    for name in DRAWINGS:
        (FOLDER.parent / f"{name}.svg").write_text(draw(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
