"""Sphinx's settings. `python docs/build.py` builds the site."""

import sys
from pathlib import Path

import jaxreg

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "jaxreg"
author = "the jaxreg authors"
copyright = "2026, the jaxreg authors"
version = release = jaxreg.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",  # ours: formulas are rendered at build, so that no page fetches a script
    "reference",  # ours: the gallery of terms and the API's pages, written from the docstrings
]
exclude_patterns = ["_build", "README.md"]

# Text: MyST, with Python executed at build. An exception fails the build.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0)]

# The docstrings: Google style, in reStructuredText.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Metrics", "params_style")]
python_maximum_signature_line_length = 88
viewcode_line_numbers = True

html_theme = "sphinx_book_theme"
html_title = f"jaxreg {release}"
html_static_path = ["_static"]
html_css_files = ["jaxreg.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
copybutton_exclude = ".linenos, .gp, .go"
