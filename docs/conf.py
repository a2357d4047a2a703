"""Configuration of Sphinx: ``sphinx-build -b html docs docs/_build``."""

import ast
import os
import re
import shutil
import sys
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from matplotlib import pyplot
from sphinx.util import logging
from sphinx_gallery.scrapers import figure_rst, matplotlib_scraper

import lowrank

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

about = metadata("lowrank")
#: Address of the repository, for links: `Repository` in [project.urls] of pyproject.toml.
repository = os.environ.get("LOWRANK_REPOSITORY") or dict(
    entry.split(", ", 1) for entry in about.get_all("Project-URL") or []
).get("Repository")

project = "lowrank"
author = "The lowrank developers"
copyright = f"{author}, BSD 3-Clause License"
release = version = about["Version"]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "project_pages",
]
exclude_patterns = ["_build", "gallery", "_ext", "_templates"]
templates_path = ["_templates"]

html_theme = "pydata_sphinx_theme"
html_title = "lowrank"
html_show_sourcelink = False
html_show_search_summary = False  # pages opened as files cannot read each other
html_static_path = ["_static"]
html_css_files = ["lowrank.css"]
# Pages without others below them have no navigation at the left.
single = "index", "install", "performance*", "glossary", "changelog", "cite", "architecture"
html_sidebars = {page: [] for page in single}
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navbar_start": ["navbar-logo", "version"],
    "secondary_sidebar_items": {"**": ["page-toc", "edit-this-page"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version", "theme-version"],
    "primary_sidebar_end": [],
    "show_toc_level": 2,
    "show_nav_level": 1,
    "navigation_depth": 3,
    "use_edit_page_button": bool(repository),
    "icon_links": [
        {"name": "Repository", "url": repository, "icon": "fa-solid fa-code-branch"}
    ] if repository else [],
}  # fmt: skip
html_context = {
    "default_mode": "auto",
    "edit_page_url_template": f"{repository}/edit/main/{{{{ edit_path or file_name }}}}",
}
smartquotes_action = "qe"  # no dashes: `--` begins an option

myst_enable_extensions = ["dollarmath", "colon_fence", "substitution", "deflist"]
myst_heading_anchors = 3
extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}
html_math_renderer = "mathml"

#: The paper is offered where it has been built; the folder is that of this checkout.
paper = HERE.parent / "paper" / "build" / "paper.pdf"
myst_substitutions = {
    "paper": "{download}`The paper (PDF) <../paper/build/paper.pdf>`"
    if paper.exists()
    else "The paper, which `python3 dev.py paper --from-data` builds,"
}

# Optional libraries need not be installed to read the docstrings of the modules that use them.
autodoc_mock_imports = [
    name for name in ("torch", "onnx", "onnxruntime", "h5py", "keras") if not find_spec(name)
]
autodoc_typehints = "none"  # docstrings describe the types
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"
# Names that differ in case only would share a file where file systems ignore case.
autosummary_filename_map = {
    f"lowrank.{name}": f"lowrank.{name}-class"
    for name in lowrank.__all__
    if name[0].isupper() and name.lower() in lowrank.__all__
}
# Classes describe their fields; a list of members would repeat them.
numpydoc_show_class_members = False

# Only code is copied: no prompts, and no output.
copybutton_selector = "div:not(.highlight-none):not(.highlight-text) > div.highlight > pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Functions in the configuration, such as `move_images`, cannot be cached between builds.
suppress_warnings = ["config.cache"]


def draw_figures(block, variables, conf, **options):
    """Save the figures of a script; photographs among them keep their colours in dark mode."""
    figures = map(pyplot.figure, pyplot.get_fignums())
    has_photograph = any(axes.images for figure in figures for axes in figure.axes)
    text = matplotlib_scraper(block, variables, conf, **options)
    return text.replace(":class: ", ":class: photograph ") if has_photograph else text


def move_images(block, variables, conf):
    """Show the images that a script wrote into its folder, and move them out of it."""
    images = []
    for written, path in zip(
        sorted(Path(variables["src_file"]).parent.glob("*.png")), variables["image_path_iterator"]
    ):
        shutil.move(written, path)
        images.append(path)
    return figure_rst(images, conf["src_dir"])


def needs_missing_library(script) -> bool:
    """Whether a script imports a library that is not installed."""
    imports = [
        n for n in ast.parse(script.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = [n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in imports]
    return any(find_spec(name.split(".")[0]) is None for name in names)


left_out = [
    p.name
    for p in sorted(Path(__file__).parent.glob("gallery/plot_*.py"))
    if needs_missing_library(p)
]
sphinx_gallery_conf = {
    # Scripts that cannot run are shown all the same, since other pages link to them.
    "filename_pattern": rf"/(?!({'|'.join(map(re.escape, left_out)) or '$'})$)plot_",
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "image_scrapers": (draw_figures, move_images),
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}


def mathml(as_block):
    """Return Sphinx's visitors that write formulas as MathML, which needs no network or scripts."""

    def visit(translator, node):
        try:
            formula = tex2mathml(node.astext(), as_block=as_block)
        except MathError as why:
            logging.getLogger(__name__).warning("formula: %s", why, location=node)
            formula = f"<code>{translator.encode(node.astext())}</code>"
        # Bars of a norm stay as high as a letter; stretched ones misplace an exponent.
        formula = formula.replace("<mo>‖</mo>", '<mo stretchy="false">‖</mo>')
        name = "div" if as_block else "span"
        translator.body.append(f'<{name} class="formula">{formula}</{name}>')
        raise SkipNode

    return visit, None


def warn_of_scripts_not_run(_, config):
    """Warn of examples that are shown without results; an option switches all of them off."""
    if left_out and str(config["plot_gallery"]) not in ("0", "False"):
        logging.getLogger(__name__).warning(
            "not run, since a library is missing: %s", ", ".join(left_out)
        )


def setup(app):
    """Register the renderer of formulas, and the check of the examples."""
    app.connect("config-inited", warn_of_scripts_not_run)
    app.add_html_math_renderer("mathml", mathml(as_block=False), mathml(as_block=True))
