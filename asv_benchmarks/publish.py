"""Publish the history as asv's site, with local copies of the scripts it loads.

    python -m asv_benchmarks.publish [--check] [--shots FOLDER]

Makes asv_benchmarks/.asv/html from the results in asv_benchmarks/results; `asv preview --config
asv_benchmarks/asv.conf.json` shows it.  asv's pages load jQuery, flot, Bootstrap and others from
the network and are blank offline; npm installs the same versions here.  `--check` opens the site in
a headless Chromium without network access and checks that graphs are drawn.
"""

from __future__ import annotations

import argparse
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "asv.conf.json"
SITE = HERE / ".asv" / "html"
PACKAGES = HERE / ".asv" / "npm"

#: File name in asv's pages: npm package, and path in it.
VENDORED = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "dist/css/bootstrap.min.css"),
}
FONTS = "dist/fonts"  # Bootstrap's style sheet expects them in ../fonts
REMOTE_FILE = re.compile(r"""<(script|link)\b[^>]*?(?:src|href)="(https?://[^"]+)"[^>]*>""")


def publish() -> None:
    """Make the site and copy the scripts into it."""
    asv = [sys.executable, "-m", "asv", "publish", "--config", str(CONFIG)]
    subprocess.run(asv, cwd=HERE, check=True)
    index = SITE / "index.html"
    index.write_text(REMOTE_FILE.sub(local, index.read_text()))
    folder = install_packages()
    for name, (package, path) in VENDORED.items():
        kind = "css" if name.endswith(".css") else "vendor"
        target = SITE / kind / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / package.rsplit("@", 1)[0] / path, target)
    shutil.copytree(folder / "bootstrap" / FONTS, SITE / "fonts", dirs_exist_ok=True)


def local(tag: re.Match[str]) -> str:
    """Return the element with the local file."""
    kind, url = tag.groups()
    name = url.rsplit("/", 1)[-1]
    if name not in VENDORED:
        raise SystemExit(f"asv's pages load {url}, which is not in {Path(__file__).name}")
    if kind == "link":
        return f'<link rel="stylesheet" href="css/{name}">'
    return f'<script src="vendor/{name}">'


def install_packages() -> Path:
    """Install the npm packages once and return their folder."""
    if not shutil.which("npm"):
        raise SystemExit("npm is missing; on Debian: apt install npm.")
    wanted = sorted({package for package, _ in VENDORED.values()})
    folder, stamp = PACKAGES / "node_modules", PACKAGES / "wanted.json"
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return folder
    PACKAGES.mkdir(parents=True, exist_ok=True)
    (PACKAGES / "package.json").write_text("{}\n")
    npm = ["npm", "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", *wanted]
    subprocess.run(npm, cwd=PACKAGES, check=True)
    stamp.write_text(json.dumps(wanted))
    return folder


# --- in a browser --------------------------------------------------------------------------------


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def served() -> Iterator[str]:
    """Serve the site; yield its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def render(url: str, shot: Path | None = None) -> str:
    """Return a page's DOM after its scripts have run; write a screenshot if asked."""
    command = [
        browser() or "chromium", "--headless", "--no-sandbox", "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "--window-size=1300,1400", "--virtual-time-budget=15000",
    ]  # fmt: skip
    if shot is not None:
        subprocess.run(
            [*command, f"--screenshot={shot}", url], capture_output=True, check=True, timeout=120
        )
    dump = [*command, "--dump-dom", url]
    return subprocess.run(dump, capture_output=True, text=True, check=True, timeout=120).stdout


def check(shots: Path | None = None) -> list[str]:
    """Return a list of faults."""
    names = json.loads((SITE / "index.json").read_text())["benchmarks"]
    some = next(name for name in names if name.endswith("track_ours_over_peer"))
    faults = []
    with served() as url:
        front = render(url, shots and shots / "index.png")
        one = render(f"{url}#{some}", shots and shots / "benchmark.png")
    thumbs = len(re.findall(r'class="benchmark-plot"', front))
    if thumbs < len(names) or front.count('class="flot-base"') + front.count("<img") < thumbs / 4:
        faults.append(f"the front page shows {thumbs} of {len(names)} benchmarks")
    if 'class="flot-base"' not in one or some not in html.unescape(one):
        faults.append(f"no graph of {some}")
    return faults


def main() -> None:
    """Publish, and check with --check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="open it in Chromium")
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="folder for screenshots")
    given = parser.parse_args()
    publish()
    print(SITE / "index.html")
    if not given.check:
        return
    if browser() is None:
        print("not checked: no Chromium")
        return
    if given.shots:
        given.shots.mkdir(parents=True, exist_ok=True)
    faults = check(given.shots)
    print("\n".join(faults) or "checked: the front page and a benchmark's graph are drawn")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
