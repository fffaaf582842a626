"""Sphinx settings."""

from importlib.metadata import version as installed_version

project = "Ritornello"
author = "The Ritornello developers"
copyright = "the Ritornello developers"
version = release = installed_version("ritornello")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"

html_theme = "furo"
html_title = "Ritornello"
