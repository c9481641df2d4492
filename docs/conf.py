"""Sphinx configuration of the documentation; `make docs` builds it."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # of the notebooks' kernels, too

import research

project = "Distributed optimization in JAX"
author = "the authors of distributed-optimization-jax"
copyright = f"2026, {author}"
release = version = research.__version__

extensions = ["cells", "myst_nb", "sphinx_copybutton", "sphinx_design"]
exclude_patterns = ["_build", "examples"]

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_theme_options = {"show_navbar_depth": 1, "home_page_in_toc": True}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
