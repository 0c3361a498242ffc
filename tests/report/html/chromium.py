"""Opens a page in headless Chromium, if the machine has one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    "",
)


def browse(page: Path, folder: Path, *options: str) -> tuple[str, str, list[str]]:
    """Opens the page. Returns the resulting document, the console messages, and every requested
    address except the page's own."""
    folder.mkdir()
    log, netlog = folder / "chrome.log", folder / "net.json"
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-default-apps", "--disable-extensions", "--metrics-recording-only"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no request leaves this machine
    command += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={netlog}"]
    command += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000", *options]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium's sandbox does not work as root
    with open(log, "wb") as errors:
        done = subprocess.run(
            [*command, page.as_uri()], stdout=subprocess.PIPE, stderr=errors, timeout=300
        )
    assert done.returncode == 0, log.read_text()[-2000:]
    console = [line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), "\n".join(console), _asked(netlog, page)


def _asked(netlog: Path, page: Path) -> list[str]:
    """The addresses the page requested. Chromium's own requests (updates, time) have no origin."""
    text = netlog.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:  # cut off where Chromium was killed
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    parameters = [event.get("params") or {} for event in events]
    asked = [p["url"] for p in parameters if p.get("initiator", "not an origin") != "not an origin"]
    return [url for url in asked if url != page.as_uri()]
