"""Every public name is documented in numpydoc's form; the README's and docs' code runs."""

import inspect
import re
import runpy
from pathlib import Path

import pytest

import lowrank
from lowrank import blocks, families, filters, machine, plots, ranks, weights

ROOT = Path(lowrank.__file__).parents[1]
PAGES = [
    p
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if p.exists() and not {"_build", "auto_gallery"} & {*p.parts}
]


def public():
    """(name, object) of everything public that is called or made."""
    for module in (lowrank, blocks, families, filters, machine, plots, ranks, weights):
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
    assert {"dense", "Factorization.compile", "correlate", "spatial", "layers"} <= set(PUBLIC)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_on_pages_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, block in enumerate(blocks_of(page, "python")):
        script = tmp_path / f"{i}.py"
        script.write_text(block)
        runpy.run_path(str(script))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_on_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert all((page.parent / link).exists() for link in local), local


def test_commands_on_the_front_page_are_real(monkeypatch, tmp_path, capsys):
    import sys

    from lowrank import cli

    photo = tmp_path / "photo.png"
    pytest.importorskip("PIL.Image").new("L", (30, 20)).save(photo)
    lines = [x for b in blocks_of(ROOT / "README.md", "sh") for x in b.splitlines()]
    commands = [x.split() for x in lines if x.startswith("lowrank ")]
    assert len(commands) == 4
    for words in commands:
        words = [w.replace("lowrank/", f"{ROOT}/lowrank/") if "/" in w else w for w in words]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr()
