"""Sphinx settings."""

from importlib.metadata import version as installed_version

project = "Ritornello"
author = "The Ritornello developers"
copyright = "the Ritornello developers"
version = release = installed_version("ritornello")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"

pygments_dark_style = "monokai"

html_theme = "furo"
html_title = "Ritornello"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6fb2", "color-brand-content": "#1f6fb2"},
    "dark_css_variables": {"color-brand-primary": "#6db3ee", "color-brand-content": "#6db3ee"},
}
