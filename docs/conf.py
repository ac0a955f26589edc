"""Sphinx configuration. Build with `make docs`; warnings are errors."""

from importlib.metadata import version as installed_version

project = "pyro_vae"
author = "The pyro_vae developers"
copyright = "The pyro_vae developers"
release = version = installed_version("pyro-vae")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"pyro_vae {release}"

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Else the attributes of a dataclass are described twice, by napoleon and by autodoc.
napoleon_use_ivar = True
