"""Sphinx configuration of the documentation; `make docs` builds it."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Also for the notebooks' kernels, which take twice as long if XLA optimizes all their programs.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import research  # noqa: E402 - after the environment is set

project = "Distributed optimization in JAX"
author = "the authors of distributed-optimization-jax"
copyright = f"2026, {author}"
release = version = research.__version__

extensions = [
  *("cells", "generate", "records", "local_mathjax"),  # of docs/_ext
  *("myst_nb", "sphinx_copybutton", "sphinx_design"),
]
exclude_patterns = ["_build", "_ext", "examples"]
nitpicky = True
smartquotes = False  # typographic quotes would turn --flag into a dash
toc_object_entries = False  # the API's headings have the same names
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "sphinx_book_theme"
html_title = project
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_theme_options = {
  "logo": {"text": project},
  "show_navbar_depth": 1,
  "show_toc_level": 2,
  "home_page_in_toc": False,
  "navbar_persistent": [],
  "use_download_button": False,
  "use_fullscreen_button": False,
}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# MathJax 3 is copied into the site, so that nothing is fetched when a page is read.
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"chtml": {"displayAlign": "left", "displayIndent": "1em", "scale": 0.92}}

nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

python_maximum_signature_line_length = 80
# Types of the standard library and of other packages have no entry here.
nitpick_ignore_regex = [("py:(class|obj|data)", r"(?!research\.).*")]

copybutton_exclude = ".linenos, .gp, .go"

# Internal links and anchors are always checked. The workflow, which has a network, also checks
# external links by LINKCHECK_EXTERNAL=1.
linkcheck_ignore = [] if os.environ.get("LINKCHECK_EXTERNAL") else [r"https?://"]
linkcheck_anchors = True
linkcheck_timeout = 20
linkcheck_workers = 4
