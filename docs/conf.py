"""How Sphinx makes the pages: ``sphinx-build -b html docs docs/_build``."""

import shutil
from importlib.metadata import version as installed
from pathlib import Path

from sphinx_gallery.scrapers import figure_rst

project = "lowrank"
author = "The lowrank developers"
release = version = installed("lowrank")
html_title = "lowrank"
html_show_sourcelink = False
html_sidebars = {"**": []}  # room for tables; the pages are at the top

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "sphinx.ext.mathjax",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]
html_theme = "pydata_sphinx_theme"
extlinks = {"arxiv": ("https://arxiv.org/abs/%s", "arXiv:%s")}

# Fields are described by their classes: listed once more they would be there twice.
numpydoc_show_class_members = False
add_module_names = False

# A function in the configuration, as `pictures` below, is not kept between builds; nothing is lost.
suppress_warnings = ["config.cache"]


def pictures(block, variables, conf):
    """Show pictures that a script wrote into its folder, and take them out of it."""
    shown = []
    for written, path in zip(
        sorted(Path(variables["src_file"]).parent.glob("*.png")), variables["image_path_iterator"]
    ):
        shutil.move(written, path)
        shown.append(path)
    return figure_rst(shown, conf["src_dir"])


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "image_scrapers": ("matplotlib", pictures),
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}
