"""Every public name is documented in numpydoc's form; the README's and docs' code runs."""

import ast
import importlib.util
import inspect
import itertools
import math
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank import blocks, engine, families, filters, perfmodel
from lowrank.families import svd
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
    """(name, object) of everything public that is called or made."""
    for module in (lowrank, blocks, families, filters, perfmodel, figures, ranks, weights):
        for name, thing in vars(module).items():
            home = getattr(thing, "__module__", "")
            ours = home.startswith(module.__name__)  # not what it imports from elsewhere
            if name.startswith("_") or not ours or not callable(thing):
                continue
            yield name, thing
            if inspect.isclass(thing) and not issubclass(thing, tuple | Exception):
                for method, value in vars(thing).items():
                    if not method.startswith("_") and inspect.isroutine(value):
                        yield f"{name}.{method}", getattr(thing, method)


PUBLIC = dict(public())

# What numpydoc's checks are about: a summary that says what, on one line, with its full stop;
# parameters that are those of the signature, each with a type and a description; returns.
CHECKS = {"GL08", "SS02", "SS03", "SS04", "SS06", "PR01", "PR02", "PR04", "PR07", "RT01", "EX01"}


def test_the_list_of_public_names_is_not_empty():
    assert {"dense", "Factorization.compile", "correlate", "spatial_svd", "layers"} <= set(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_are_numpydoc(name):
    validate = pytest.importorskip("numpydoc.validate")
    thing = PUBLIC[name]
    full = f"{thing.__module__}.{thing.__qualname__}"
    wanted = CHECKS
    if inspect.isclass(thing):
        wanted = CHECKS - {"PR01"}  # fields are described as attributes
    found = [(code, text) for code, text in validate.validate(full)["errors"] if code in wanted]
    # optional pieces: an example of what needs files or a display, of what a class already shows
    exempt = {"EX01"} if name in NO_EXAMPLE else set()
    assert [e for e in found if e[0] not in exempt] == []


#: What is made by the library alone, and what measures the machine.
NO_EXAMPLE = {
    "Family", "Point", "NotApplicable", "ConvergenceWarning", "Machine", "Option", "Rates",
    "Machine.from_json", "Machine.to_json", "calibrate",
}  # fmt: skip


def test_families_name_their_source():
    for name in families.FAMILIES:
        doc = inspect.getdoc(getattr(lowrank, name))
        for section in ("Parameters", "Returns", "Raises", "Notes", "References", "Examples"):
            assert f"\n{section}\n---" in doc, (name, section)


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def scripts_of(page):
    """(code, what it prints or None) of every block of Python: a block of text that follows."""
    fences = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    for (language, code), (after, text) in itertools.pairwise([*fences, ("", "")]):
        if language == "python":
            yield code, text if after == "text" else None


def lacking(code):
    """What a block imports and this machine has not: PyTorch, or CuPy with a GPU."""
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


def words_of(line):
    """Words and numbers of a printed line, without what is the machine's: times and ratios."""
    line = re.sub(r"\d[\d.]* (us|ms|s)\b", "time", line)
    line = re.sub(r"\d[\d.]*(x|%)(?=\s|$)", "ratio", line)
    return re.findall(r"\d+\.?\d*(?:e[-+]\d+)?|[^\d\s]+", line)


def alike(shown, printed):
    """Whether two lines say the same, numbers within a hundredth (other BLAS, other rounding)."""
    a, b = words_of(shown), words_of(printed)
    return len(a) == len(b) and all(
        math.isclose(float(x), float(y), rel_tol=0.01, abs_tol=2e-4)
        if x[0].isdigit() and y[0].isdigit()
        else x == y
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_on_pages_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = dict(families.FAMILIES), dict(svd.ROWS)  # a page may add one
    together = ROOT / "docs" in page.parents  # the blocks of such a page are one program
    space, without = {}, []
    try:
        for i, (code, text) in enumerate(scripts_of(page)):
            if lacking(code):
                without.append(f"block {i + 1} without {lacking(code)}")
                continue
            script = tmp_path / f"{i}.py"
            script.write_text(code)
            capsys.readouterr()
            found = runpy.run_path(str(script), space if together else None)
            space = {k: v for k, v in found.items() if not k.startswith("__")}
            printed = iter(capsys.readouterr().out.splitlines())
            for line in (text or "").splitlines():
                if line.strip() not in ("", "..."):
                    assert any(alike(line, other) for other in printed), f"not printed: {line}"
    finally:
        for table, before in zip((families.FAMILIES, svd.ROWS), kept):
            table.clear()
            table.update(before)
    if without:
        pytest.skip(", ".join(without))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_on_pages_exist(page):
    typer = pytest.importorskip("typer.main")
    from lowrank.cli import app

    commands = typer.get_command(app).commands
    lines = [x for b in blocks_of(page, "sh") for x in b.replace("\\\n", " ").splitlines()]
    for words in (line.split("#")[0].split() for line in lines):
        if words and words[0].rpartition("/")[2] == "lowrank":
            known = {o for p in commands[words[1]].params for o in p.opts} | {"--help"}
            assert {w.split("=")[0] for w in words if w.startswith("-")} <= known, words
        if words[1:2] == ["dev.py"]:
            assert re.search(rf"dev\.py {words[2]}\b", (ROOT / "dev.py").read_text()), words


def test_pages_are_built_without_warnings(tmp_path):
    for name in ("sphinx", "pydata_sphinx_theme", "myst_parser", "sphinx_gallery", "numpydoc"):
        pytest.importorskip(name)
    if not (ROOT / "docs").exists():
        pytest.skip("no pages here")
    # A copy, since the gallery writes beside its scripts; a process, as it changes matplotlib.
    ignored = shutil.ignore_patterns("_build", "auto_gallery")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=ignored)
    options = ["-W", "--keep-going", "-q", "-D", "plot_gallery=0", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, tmp_path / "docs", tmp_path / "html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {p: p.read_text() for p in (tmp_path / "html").rglob("*.html")}
    assert "<math" in made[tmp_path / "html" / "theory" / "networks.html"]
    elsewhere = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//")
    assert [p.name for p, text in made.items() if elsewhere.search(text)] == []  # read offline


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_on_pages_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#]+)", prose)
    local = [link for link in links if "://" not in link]
    # Pages of the gallery are made from its scripts.
    made = [re.sub(r"auto_gallery/(plot_\w+)\.rst$", r"gallery/\1.py", link) for link in local]
    made = [link.replace("auto_gallery/index.rst", "gallery/README.rst") for link in made]
    assert all((page.parent / link).exists() for link in made), made


def test_commands_on_the_front_page_are_real(monkeypatch, tmp_path, capsys):
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
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr()
