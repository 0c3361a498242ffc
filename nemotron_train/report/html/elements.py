"""Elements, tables and the frame of the HTML page, as text. Every text of a user is escaped.

The page's content security policy forbids loading anything. It lets only our own script run, which
it knows by its hash. So even a name or a value that was not escaped could do no harm.
"""

import base64
import hashlib
from collections.abc import Container, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nemotron_train.config.json_text import json_text

_ASSETS = Path(__file__).parent / "assets"
# All scripts share one closure, in this order. page.js comes last: it starts the rest.
_SCRIPTS = (
    "state.js",
    "theme.js",
    "axes.js",
    "parts.js",
    "curves.js",
    "pointer.js",
    "chart.js",
    "heat_map.js",
    "page.js",
)


def element(tag: str, text: str, *, cls: str = "", **attributes: str) -> str:
    """`<tag class=cls …>text</tag>`, with text and attributes escaped."""
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
    """A table in a box that scrolls sideways on a narrow screen.

    numbers: the columns that are aligned to the right. marks: the texts that are shown as badges,
    each in the CSS class of its name; " + " joins several in one cell.
    """

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
    """A section that the reader can fold and unfold. `content` is HTML."""
    opened = " open" if is_open else ""
    return f"<details{opened}>{element('summary', summary)}{content}</details>"


def _script() -> str:
    text = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{text}}})();\n'


def frame(title: str, body: str, data: Any) -> str:
    """The whole document. `body` is HTML; `data` are plain values for the scripts."""
    script = _script()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json_text(data, ensure_ascii=True, separators=(",", ":"))
    # Only `</script` and `<!--` have a meaning in a script element. Without `<` there is neither.
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    scripts = (
        f'<script type="application/json" id="data">{text}</script>\n<script>{script}</script>'
    )
    return _document(title, f"{body}\n{scripts}", f"script-src 'sha256-{digest}'; ")


def still_frame(title: str, body: str, style: str = "") -> str:
    """The whole document of a page without charts and scripts. `body` is HTML; `style` is CSS
    besides the pages' own."""
    return _document(title, body, "", style)


def _document(title: str, body: str, script_policy: str, more_style: str = "") -> str:
    style = (_ASSETS / "page.css").read_text(encoding="utf-8") + more_style
    policy = (
        f"default-src 'none'; {script_policy}style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n{element("title", title)}\n<style>{style}</style>\n'
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
