"""Public names have numpydoc docstrings; the code blocks of README and docs run."""

import ast
import html
import importlib.util
import inspect
import itertools
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank import blocks, engine, families, filters, ndimage, perfmodel
from lowrank.interop import weights
from lowrank.report import figures
from lowrank.selection import ranks

ROOT = Path(lowrank.__file__).parents[1]
PAGES = [
    p
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if p.exists() and not {"_build", "auto_gallery"} & {*p.parts}
]


def public():
    """Yield (name, object) of every public function, class and method."""
    modules = lowrank, blocks, families, filters, ndimage, perfmodel, figures, ranks, weights
    for module in modules:
        for name in dir(module):  # names of lowrank are imported at their first use
            value = getattr(module, name)
            is_ours = getattr(value, "__module__", "").startswith(module.__name__)
            if name.startswith("_") or not is_ours or not callable(value):
                continue
            yield f"ndimage.{name}" if module is ndimage else name, value
            if inspect.isclass(value) and not issubclass(value, tuple | Exception):
                for method, function in vars(value).items():
                    if not method.startswith("_") and inspect.isroutine(function):
                        yield f"{name}.{method}", getattr(value, method)


PUBLIC = dict(public())

# numpydoc's checks of: a summary on one line with a full stop; the parameters of the signature,
# each with a type and a description; returns; an example.
CHECKS = {"GL08", "SS02", "SS03", "SS04", "SS06", "PR01", "PR02", "PR04", "PR07", "RT01", "EX01"}


def test_public_names_are_found():
    assert {"dense", "Factorization.compile", "correlate", "ndimage.correlate"} <= set(PUBLIC)
    assert {"spatial_svd", "layers"} <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_are_numpydoc(name):
    validate = pytest.importorskip("numpydoc.validate")
    value = PUBLIC[name]
    checks = CHECKS - {"EX01"} if name in NO_EXAMPLE else CHECKS
    if inspect.isclass(value):
        checks = checks - {"PR01"}  # fields are described as attributes
    errors = validate.validate(f"{value.__module__}.{value.__qualname__}")["errors"]
    assert [(code, text) for code, text in errors if code in checks] == []


#: Objects that only the library creates, and functions that measure the machine.
NO_EXAMPLE = {
    "Family", "Point", "NotApplicable", "ConvergenceWarning", "PerformanceModel", "Option",
    "Coefficients", "PerformanceModel.from_json", "PerformanceModel.to_json", "calibrate",
}  # fmt: skip


def test_families_have_every_docstring_section():
    for name in families.FAMILIES:
        doc = inspect.getdoc(getattr(lowrank, name))
        for section in ("Parameters", "Returns", "Raises", "Notes", "References", "Examples"):
            assert f"\n{section}\n---" in doc, (name, section)


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def scripts_of(page):
    """Yield (code, output of the text block that follows, or None) of every Python block."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    for (language, code), (after, text) in itertools.pairwise([*fences, ("", "")]):
        if language == "python":
            yield code, text if after == "text" else None


def missing_requirement(code):
    """Return the name of what a block needs and this machine lacks (PyTorch, a GPU), or None."""
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {
        name for n in nodes for name in ([a.name for a in n.names] + [getattr(n, "module", "")])
    }
    names = {part for name in names for part in name.split(".")}
    if "torch" in names and importlib.util.find_spec("torch") is None:
        return "torch"
    if "cupy" in names:
        try:
            engine.check_gpu()
        except (ImportError, RuntimeError):
            return "a GPU"
    return None


def tokenize(line):
    """Return the words and numbers of a printed line, with times and ratios masked."""
    line = re.sub(r"\d[\d.]* (us|ms|s)\b", "time", line)
    line = re.sub(r"\d[\d.]*(x|%)(?=\s|$)", "ratio", line)
    return re.findall(r"\d+\.?\d*(?:e[-+]\d+)?|[^\d\s]+", line)


def is_close_line(shown: str, printed: str) -> bool:
    """Whether two lines agree, numbers within 1 % (another BLAS rounds differently)."""
    a, b = tokenize(shown), tokenize(printed)
    return len(a) == len(b) and all(
        math.isclose(float(x), float(y), rel_tol=0.01, abs_tol=2e-4)
        if x[0].isdigit() and y[0].isdigit()
        else x == y
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_on_pages_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = dict(families.FAMILIES)  # a page may add a family
    is_one_program = ROOT / "docs" in page.parents  # blocks of the README are independent
    space, skipped = {}, []
    try:
        for i, (code, text) in enumerate(scripts_of(page)):
            if missing_requirement(code):
                skipped.append(f"block {i + 1} needs {missing_requirement(code)}")
                continue
            script = tmp_path / f"{i}.py"
            script.write_text(code)
            capsys.readouterr()
            names = runpy.run_path(str(script), space if is_one_program else None)
            space = {k: v for k, v in names.items() if not k.startswith("__")}
            printed = iter(capsys.readouterr().out.splitlines())
            for line in (text or "").splitlines():
                if line.strip() not in ("", "..."):
                    assert any(is_close_line(line, other) for other in printed), (
                        f"not printed: {line}"
                    )
    finally:
        families.FAMILIES.clear()
        families.FAMILIES.update(saved)
    if skipped:
        pytest.skip(", ".join(skipped))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_on_pages_exist(page):
    typer = pytest.importorskip("typer.main")
    from lowrank.cli.program import app

    commands = typer.get_command(app).commands
    lines = [x for b in blocks_of(page, "sh") for x in b.replace("\\\n", " ").splitlines()]
    for words in (line.split("#")[0].split() for line in lines):
        if words and words[0].rpartition("/")[2] == "lowrank":
            known = {o for p in commands[words[1]].params for o in p.opts} | {"--help"}
            assert {w.split("=")[0] for w in words if w.startswith("-")} <= known, words
        if words[1:2] == ["dev.py"]:
            assert re.search(rf"dev\.py {words[2]}\b", (ROOT / "dev.py").read_text()), words


#: Address of a repository that does not exist, from which the pages' links are made in tests.
REPOSITORY = "https://example.org/lowrank"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the pages, without running the gallery; return their folder."""
    needed = "sphinx", "pydata_sphinx_theme", "myst_parser", "sphinx_gallery", "sphinx_copybutton"
    for name in (*needed, "numpydoc", "typer"):
        pytest.importorskip(name)
    if not (ROOT / "docs").exists():
        pytest.skip("no pages here")
    # A copy, since the gallery writes beside its scripts; a process, as it changes matplotlib.
    folder = tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("_build", "auto_gallery", "api")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=ignored)
    for name in ("README.md", "CHANGELOG.md", "paper/data/headline.json"):  # in parts of pages
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    options = ["-W", "--keep-going", "-q", "-D", "plot_gallery=0", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, folder / "docs", folder / "html"]
    env = os.environ | {"LOWRANK_REPOSITORY": REPOSITORY}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert process.returncode == 0, process.stderr
    return folder / "html"


@pytest.mark.full
def test_pages_are_built_without_warnings(site):
    made = {p: p.read_text() for p in site.rglob("*.html")}
    assert "<math" in made[site / "theory" / "networks.html"]
    elsewhere = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//")
    assert [p.name for p, text in made.items() if elsewhere.search(text)] == []  # read offline


@pytest.mark.full
def test_links_between_built_pages_resolve(site):
    made = {p: p.read_text() for p in site.rglob("*.html") if "_modules" not in p.parts}
    targets = {p: set(re.findall(r"\bid=\"([^\"]+)\"", text)) for p, text in made.items()}
    broken = []
    for page, text in made.items():
        for link in re.findall(r"<a\b[^>]*\bhref=\"([^\"]+)\"", text):
            path, _, place = html.unescape(link).partition("#")
            if "://" in path or path.startswith("mailto:"):
                continue
            target = (page.parent / path).resolve() if path else page
            known = targets.get(target, {place})
            if not target.exists() or (place and place not in known):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("howto/calibrate", "docs/howto/calibrate.md"),
        ("changelog", "CHANGELOG.md"),
        ("auto_gallery/plot_filters", "docs/gallery/plot_filters.py"),
        ("reference/lowrank", "docs/reference/lowrank.rst"),
        ("reference/api/lowrank.approximate", "lowrank/selection/choice.py"),
        ("reference/api/lowrank.Certificate-class", "lowrank/certify/bounds.py"),
    ],
)
def test_pages_link_to_their_source(site, page, source):
    text = (site / f"{page}.html").read_text()
    assert f'href="{REPOSITORY}/edit/main/{source}"' in text
    assert f'href="{REPOSITORY}"' in text
    assert (ROOT / source).exists()


@pytest.mark.full
def test_command_line_page_lists_every_option(site):
    from typer.main import get_command

    from lowrank.cli.program import app

    text = (site / "reference" / "command-line.html").read_text()
    for name, command in get_command(app).commands.items():
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f'id="cmdoption-lowrank-{name}-{option.strip("-")}"' in text, (name, option)


#: A page of every kind, which the test below opens.
MAIN_PAGES = (
    "index", "install", "tutorials/filters", "howto/index", "howto/platforms", "theory/networks",
    "auto_gallery/index", "auto_gallery/plot_filters", "reference/index", "reference/lowrank",
    "reference/api/lowrank.approximate", "reference/api/lowrank.Factorization",
    "reference/command-line", "performance", "performance-log", "glossary", "changelog", "cite",
    "architecture", "genindex", "search",
)  # fmt: skip

#: Pixels by which the page, or its text, is wider than its place.
OVERFLOW = """() => Math.max(...[document.documentElement, document.querySelector("article")]
    .filter(Boolean).map(e => e.scrollWidth - e.clientWidth))"""


@pytest.mark.full
def test_pages_open_in_a_browser(site):
    playwright = pytest.importorskip("playwright.sync_api")
    names = "chromium", "chromium-browser", "google-chrome"
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("Chromium is not installed")
    faults = []
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width, scheme in itertools.product((390, 1280), ("light", "dark")):
            size = {"width": width, "height": 900}
            tab = chromium.new_page(viewport=size, color_scheme=scheme)
            messages = []
            add = messages.append
            tab.on("console", lambda m, add=add: m.type in ("error", "warning") and add(m.text))
            tab.on("pageerror", lambda error, add=add: add(str(error)))
            tab.on("requestfailed", lambda request, add=add: add(f"not loaded: {request.url}"))
            for page in MAIN_PAGES:
                query = "?q=tucker" if page == "search" else ""
                tab.goto((site / f"{page}.html").as_uri() + query)
                if query:
                    tab.wait_for_selector("#search-results li")
                if tab.evaluate("document.documentElement.dataset.theme") != scheme:
                    messages.append("has another colour scheme")
                if (pixels := tab.evaluate(OVERFLOW)) > 0:
                    messages.append(f"is {pixels} pixels too wide")
                faults += [f"{page}, {width} pixels, {scheme}: {fault}" for fault in messages]
                messages.clear()
        chromium.close()
    assert faults == []


def listed_names():
    """Return the names in the tables of the reference, by module."""
    found = {}
    for page in (ROOT / "docs" / "reference").glob("lowrank*.rst"):
        tables = re.findall(r"^   :toctree: api\n\n((?:   \w+\n)+)", page.read_text(), re.MULTILINE)
        found[page.stem] = " ".join(tables).split()
    return found


#: Modules of the reference that need another library.
OPTIONAL = {"lowrank.interop.torch": "torch", "lowrank.interop.onnx": "onnx",
            "lowrank.interop.keras": "keras", "lowrank.engine.dask": "dask",
            "lowrank.filters.dask": "dask"}  # fmt: skip


def test_reference_lists_every_public_name():
    listed = listed_names()
    for module, names in listed.items():
        assert len(names) == len({*names}), module
        if importlib.util.find_spec(OPTIONAL.get(module, "numpy")) is None:
            continue
        assert [n for n in names if not hasattr(importlib.import_module(module), n)] == []
    modules = {"blocks", "filters", "ndimage", "perfmodel", "ranks", "weights"}
    assert {*lowrank.__all__} - modules == {*listed["lowrank"]}
    everywhere = {name for names in listed.values() for name in names}
    public = {name.removeprefix("ndimage.") for name in PUBLIC}
    assert {name for name in public if "." not in name} - everywhere == set()


def test_citation_agrees_with_the_package():
    page = (ROOT / "docs" / "cite.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[
        1
    ]
    title = re.search(r'^title: "(.+)"$', citation, re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in citation
    assert f"version = {{{version}}}" in page
    assert f"title   = {{{title}}}" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_on_pages_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#]+)", prose)
    local = [link for link in links if "://" not in link]
    # Pages of the gallery are made from its scripts.
    made = [re.sub(r"auto_gallery/(plot_\w+)\.rst$", r"gallery/\1.py", link) for link in local]
    made = [link.replace("auto_gallery/index.rst", "gallery/README.rst") for link in made]
    assert all((page.parent / link).exists() for link in made), made


def test_commands_of_the_readme_run(monkeypatch, tmp_path, capsys):
    from lowrank import cli

    photo = tmp_path / "photo.png"
    pytest.importorskip("PIL.Image").new("L", (30, 20)).save(photo)
    lines = [x for b in blocks_of(ROOT / "README.md", "sh") for x in b.splitlines()]
    commands = [x.split() for x in lines if x.startswith("lowrank ")]
    assert commands
    for words in commands:
        words = [w.replace("lowrank/", f"{ROOT}/lowrank/") if "/" in w else w for w in words]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 0, capsys.readouterr()
