"""Configuration of Sphinx: ``sphinx-build -b html docs docs/_build``."""

import ast
import re
import shutil
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx_gallery.scrapers import figure_rst

project = "lowrank"
author = "The lowrank developers"
release = version = installed("lowrank")
html_title = "lowrank"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["lowrank.css"]
html_sidebars = {"**": []}  # room for tables; the parts are at the top, their pages in each part
html_theme_options = {
    "header_links_before_dropdown": 8,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
}

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]
html_math_renderer = "mathml"
# Optional libraries need not be installed to read the docstrings of the modules that use them.
autodoc_mock_imports = [
    name for name in ("torch", "onnx", "onnxruntime", "h5py", "keras") if not find_spec(name)
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "pydata_sphinx_theme"
extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}

# Classes describe their fields; a list of members would repeat them.
numpydoc_show_class_members = False
add_module_names = False

# Functions in the configuration, such as `move_images`, cannot be cached between builds.
suppress_warnings = ["config.cache"]


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
if left_out:
    logging.getLogger(__name__).info("not run, since a library is missing: %s", ", ".join(left_out))

sphinx_gallery_conf = {
    # Scripts that cannot run are shown all the same, since other pages link to them.
    "filename_pattern": rf"/(?!({'|'.join(map(re.escape, left_out)) or '$'})$)plot_",
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "image_scrapers": ("matplotlib", move_images),
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


def setup(app):
    """Register the renderer of formulas."""
    app.add_html_math_renderer("mathml", mathml(as_block=False), mathml(as_block=True))
