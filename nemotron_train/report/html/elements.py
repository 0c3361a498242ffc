"""HTML by hand, every text of a user escaped: elements, tables, the frame of the page.

The page's policy lets nothing be loaded and only our own script run, known by its hash: a name or
a value that got past the escaping would still be inert.
"""

import base64
import hashlib
import json
from collections.abc import Container, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

_ASSETS = Path(__file__).parent / "assets"


def element(tag: str, text: str, *, cls: str = "", **attributes: str) -> str:
    """`<tag class=cls …>text</tag>`, text and attributes escaped."""
    named = {"class": cls} if cls else {}
    named |= {name.replace("_", "-"): value for name, value in attributes.items()}
    words = "".join(f' {name}="{escape(value)}"' for name, value in named.items())
    return f"<{tag}{words}>{escape(text)}</{tag}>"


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers: Container[int] = (),
    cls: str = "",
    marks: Container[str] = (),
) -> str:
    """A table in a box that scrolls sideways on a narrow screen. `numbers`: columns set to the
    right; `marks`: texts shown as a badge of that class."""

    def cell(tag: str, column: int, text: str) -> str:
        words = [element("span", word, cls=f"badge {word}") for word in text.split(" + ")]
        if text and all(word in marks for word in text.split(" + ")):
            return f"<{tag}>{' '.join(words)}</{tag}>"
        return element(tag, text, cls="number" if column in numbers else "")

    head = "".join(cell("th", column, text) for column, text in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(cell("td", column, text) for column, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    words = f' class="{escape(cls)}"' if cls else ""
    return (
        f'<div class="scroll"><table{words}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    """A part that is folded away; `content` is HTML."""
    opened = " open" if is_open else ""
    return f"<details{opened}>{element('summary', summary)}{content}</details>"


def frame(title: str, body: str, data: Any) -> str:
    """The whole document. `data`: plain values that page.js reads."""
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # In a script element only `</script` and `<!--` mean anything; without any `<` neither occurs.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n{element("title", title)}\n<style>{style}</style>\n'
        f'</head>\n<body>\n{body}\n<script type="application/json" id="data">{text}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
