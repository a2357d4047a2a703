"""Directives and links of these pages that are made from the project's own files.

``commands``     the commands of ``lowrank``, from the parser of its command line
``comparison``   rows of the measured times in several libraries, from paper/data/headline.json
``edit_path``    in templates: the file of the repository that a page is made from
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import lowrank
from lowrank.cli.program import app as command_line

RESULTS = Path(__file__).resolve().parents[2] / "paper" / "data" / "headline.json"


class Commands(SphinxDirective):
    """Section per command: its help, usage, arguments and options."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        root: Any = typer.main.get_command(command_line)
        lines = [
            line
            for name, command in root.commands.items()
            for line in describe_command(f"lowrank {name}", command)
        ]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def describe_command(title: str, command: Any) -> list[str]:
    """Return lines of reStructuredText about one command."""
    context = command.context_class(command, info_name=title)
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [title, "-" * len(title), ""]
    texts = [text for text in (command.help, command.epilog) if text]
    for paragraph in re.split(r"\n\s*\n", "\n\n".join(map(inspect.cleandoc, texts))):
        lines += [*quote_paragraph(paragraph), ""]
    lines += [".. code-block:: none", "", f"   {usage}", "", f".. program:: {title}", ""]
    for parameter in command.get_params(context):
        if "--help" not in parameter.opts:
            names, text = parameter.get_help_record(context)
            lines += [f".. option:: {names}", "", f"   {escape(text)}", ""]
    return lines


def quote_paragraph(text: str) -> list[str]:
    """Return a paragraph of a help text: examples of commands as code, the rest as prose."""
    rows = [row.strip() for row in text.replace("\b", "").splitlines() if row.strip()]
    if rows and all(row.startswith(("lowrank ", "$ lowrank ")) for row in rows):
        return [".. code-block:: sh", "", *(f"   {row.removeprefix('$ ')}" for row in rows)]
    return [escape(" ".join(rows))]


def escape(text: str) -> str:
    """Return text as reStructuredText whose only markup is that of options, as code."""
    plain = re.sub(r"([\\*`|_])", r"\\\1", text)
    return re.sub(r"(?<![\w-])--[a-z][\w-]*", r"``\g<0>``", plain)


class Comparison(SphinxDirective):
    """Table of measured times: lowrank's, and those of the fastest other library.

    Each line of the content is a row, ``label | title in the file of results``; the label may be
    left out.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.env.note_dependency(RESULTS)
        rows = json.loads(RESULTS.read_text())["rows"]
        lines = ["| milliseconds | lowrank | fastest other | ratio |", "| --- | --: | --: | --: |"]
        for text in filter(None, self.content):
            label, _, title = (word.strip() for word in text.rpartition("|"))
            if title not in rows:
                raise self.error(f"no row of {RESULTS} is named {title!r}: {', '.join(rows)}")
            times = {library: cell["ms"] for library, cell in rows[title].items()}
            own = times.pop("lowrank")
            other = min(times, key=times.__getitem__)
            found = f"{digits(own, 3)} | {digits(times[other], 3)} ({other})"
            lines.append(f"| {label or title} | {found} | {digits(times[other] / own, 2)} |")
        return self.parse_text_to_nodes("\n".join(lines))


def digits(value: float, count: int) -> str:
    """Return a number with so many significant digits, halves rounded up as in the README."""
    exact = Decimal(repr(value))
    unit = Decimal(1).scaleb(min(0, exact.adjusted() + 1 - count))
    return f"{exact.quantize(unit, ROUND_HALF_UP):f}"


def edit_path(page: str, suffix: str) -> str:
    """Return the file of the repository that a page is made from."""
    if page.startswith("auto_gallery/plot_"):
        return page.replace("auto_gallery", "docs/gallery") + ".py"
    if page == "auto_gallery/index":
        return "docs/gallery/README.rst"
    if page == "changelog":
        return "CHANGELOG.md"
    if page.startswith("reference/api/"):
        module, _, name = page.removeprefix("reference/api/").rpartition(".")
        value = getattr(importlib.import_module(module), name.removesuffix("-class"))
        place = inspect.getmodule(value) or importlib.import_module(module)
        package = Path(lowrank.__file__).parent
        return Path(str(place.__file__)).relative_to(package.parent).as_posix()
    return f"docs/{page}{suffix}"


def add_edit_path(
    _: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document | None
) -> None:
    """Add `edit_path` to the context of a page that is made from a document."""
    if tree is not None:
        context["edit_path"] = edit_path(page, context["page_source_suffix"])


def skip_alias(*arguments: Any) -> bool | None:
    """Leave out the fields of named tuples, which Python documents by number."""
    _, _, _, value, _, _ = arguments
    return True if (value.__doc__ or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and what is called for every page."""
    app.add_directive("commands", Commands)
    app.add_directive("comparison", Comparison)
    app.connect("html-page-context", add_edit_path)
    app.connect("autodoc-skip-member", skip_alias)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
