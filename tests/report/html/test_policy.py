"""The page's content security policy, attacked in a browser: text that reaches the page unescaped
does nothing.

Every text is escaped as well (test_page.py); the policy is the second wall. The control shows that
each attack works on a page without it. Needs Chromium on PATH. Not covered: `<meta refresh>` and
links that a reader follows, which no policy forbids; other browsers; that our own script still
runs (test_browser.py).
"""

import re
from pathlib import Path

import pytest

from nemotron_train.report.html.elements import frame
from tests.report.html.chromium import CHROMIUM, browse

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")

SERVER = "http://127.0.0.1:9"
RUNS = "document.documentElement.dataset.broken+=' %s'"
# Name -> HTML. Those that run a script add their name to the document, the others load something.
SCRIPTS = {
    "inline": "<script>{run}</script>",
    "nonce": '<script nonce="">{run}</script>',
    "module": "<script type=module>{run}</script>",
    "handler": '<img src=data:, onerror="{run}">',
    "svg": '<svg onload="{run}"></svg>',
    "details": '<details open ontoggle="{run}">x</details>',
    "data-script": '<script src="data:text/javascript,{run}"></script>',
    "frame": '<iframe srcdoc="<script>parent.{run}</script>"></iframe>',
}
LOADS = {
    "image": "<img src={url}>",
    "script": "<script src={url}></script>",
    "style": "<link rel=stylesheet href={url}>",
    "import": "<style>@import url({url});</style>",
    "background": '<p style="background:url({url})">x</p>',
    "font": "<style>@font-face {{font-family:x; src:url({url})}} p {{font-family:x}}</style><p>x",
    "frame": "<iframe src={url}></iframe>",
    "object": "<object data={url}></object>",
    "video": "<video src={url} autoplay muted></video>",
    "input": "<input type=image src={url}>",
    "prefetch": "<link rel=preload as=image href={url}>",
    "base": "<base href={url}/><img src=relative>",
}


def body() -> str:
    attacks = [html.format(run=RUNS % name) for name, html in SCRIPTS.items()]
    attacks += [html.format(url=f"{SERVER}/{name}") for name, html in LOADS.items()]
    return "\n".join(attacks)


def test_what_is_not_escaped_does_nothing(tmp_path: Path) -> None:
    whole = frame("title", body(), {"xs": [], "runs": [], "charts": [], "heats": []})
    (page := tmp_path / "page.html").write_text(whole)
    document, console, asked = browse(page, tmp_path / "guarded", "--dump-dom")
    assert asked == [] and "data-broken" not in document
    assert "Content Security Policy" in console, "the attacks were tried and refused"

    (page := tmp_path / "open.html").write_text(re.sub(r"<meta http-equiv[^>]*>", "", whole))
    document, _, asked = browse(page, tmp_path / "open", "--dump-dom")
    broken = re.search(r'data-broken="([^"]*)"', document)
    assert broken and set(broken[1].split()) >= SCRIPTS.keys(), "each script attack works without"
    reached = {address.removeprefix(f"{SERVER}/").split("/")[0] for address in asked}
    assert reached >= LOADS.keys() - {"base"} and any("relative" in address for address in asked)
