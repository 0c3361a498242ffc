"""Draws docs/architecture.svg: the layers of the package and the imports between them.

Run `python docs/architecture.py` after a change of the imports; tests/test_architecture.py compares
the picture with the code. A row is a layer, a folder directly under nemotron_train/. A number says
how many modules of the row's layer import the column's layer. All numbers lie to the right of the
grey diagonal, because imports go down.
"""

import ast
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "nemotron_train"
PICTURE = DOCS / "architecture.svg"

CELL, ROW_HEIGHT = 34, 34
NAME_WIDTH, TEXT_WIDTH, TOP = 120, 560, 120
# Okabe and Ito's blue for imports, grey for what a layer does; readable on white and on black.
INK, SOFT, BLUE = "#222222", "#666666", (0, 114, 178)


def layer_of(path: Path) -> str:
    """The folder directly under the package, or the module itself."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def purpose(layer: str) -> str:
    """The first sentence of the layer's docstring."""
    folder = PACKAGE / layer
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split()).split(". ")[0].removesuffix(".")


def import_counts() -> dict[str, dict[str, int]]:
    """For each layer, how many of its modules import each other layer."""
    importers: dict[tuple[str, str], set[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py" and path.parent == PACKAGE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "nemotron_train" and len(parts) > 1 and parts[1] != "__version__":
                    importers.setdefault((layer_of(path), parts[1]), set()).add(path)
    counts: dict[str, dict[str, int]] = {}
    for (layer, target), paths in importers.items():
        if layer != target:
            counts.setdefault(layer, {})[target] = len(paths)
    return counts


def _row(
    number: int,
    layer: str,
    layers: Sequence[str],
    row_counts: Mapping[str, int],
    most: int,
    width: int,
) -> list[str]:
    """One layer: its name, what it does, its column's heading, and its imports."""
    left = NAME_WIDTH + TEXT_WIDTH
    y = TOP + number * ROW_HEIGHT
    middle = y + ROW_HEIGHT / 2 + 4
    x = left + number * CELL
    lines = []
    if number % 2 == 0:
        lines.append(f'<rect y="{y}" width="{width}" height="{ROW_HEIGHT}" fill="#f4f4f4"/>')
    text = escape(purpose(layer))
    heading = f'x="{x + CELL / 2}" y="{TOP - 8}" fill="{INK}"'
    lines += [
        f'<text x="12" y="{middle}" font-weight="bold" fill="{INK}">{layer}</text>',
        f'<text x="{NAME_WIDTH}" y="{middle}" fill="{SOFT}">{text}</text>',
        f'<text {heading} transform="rotate(-55 {x + CELL / 2} {TOP - 8})">{layer}</text>',
        f'<rect x="{x}" y="{y}" width="{CELL}" height="{ROW_HEIGHT}" fill="#cccccc"/>',
    ]
    for target, count in sorted(row_counts.items()):
        column = left + layers.index(target) * CELL
        shade = 0.15 + 0.85 * count / most
        red, green, blue = (round(255 - shade * (255 - part)) for part in BLUE)
        ink = "white" if shade > 0.5 else INK
        box = f'x="{column + 1}" y="{y + 1}" width="{CELL - 2}" height="{ROW_HEIGHT - 2}" rx="4"'
        place = f'x="{column + CELL / 2}" y="{middle}" text-anchor="middle"'
        lines.append(f'<rect {box} fill="rgb({red},{green},{blue})"/>')
        lines.append(f'<text {place} fill="{ink}">{count}</text>')
    return lines


def draw(layers: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> str:
    """The picture as SVG text, the same for the same code."""
    left = NAME_WIDTH + TEXT_WIDTH
    width = left + CELL * len(layers) + 20
    height = TOP + ROW_HEIGHT * len(layers) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="13">',
        "<title>Layers of nemotron_train and the imports between them</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    most = max(count for row in counts.values() for count in row.values())
    for number, layer in enumerate(layers):
        lines += _row(number, layer, layers, counts.get(layer, {}), most, width)
    caption = (
        "A row imports the columns to its right, that is, layers below it. "
        "Numbers: modules of the row that import the column."
    )
    lines.append(f'<text x="12" y="{height - 14}" fill="{SOFT}">{escape(caption)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def picture() -> str:
    """The picture of the code as it is."""
    sys.path.insert(0, str(DOCS.parent))
    from tests.test_architecture import LAYERS

    return draw(LAYERS, import_counts())


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE}")
