"""The colours of a report's pictures, on light pages and on dark ones."""

from __future__ import annotations

LIGHT = ("#ff4110", "#1f66d0", "#00663d", "#6a2c91", "#659134", "#2e9bb1", "#b8447a")
DARK = ("#ff995c", "#5c7fff", "#47cb98", "#b990e7", "#e6d647", "#8fdceb", "#df609d")
"""The same ones on a dark page. They are told apart from each other, also by colour-blind readers,
and from the page: a test measures both."""

PALETTE = LIGHT
COLOURS = {
    "incremental": LIGHT[0],
    "rehearsal": LIGHT[1],
    "from-scratch": LIGHT[2],
    "joint": LIGHT[6],
}
"""A strategy's own."""

PAPER = ("#fbfaf7", "#15171b")
CARD = ("#ffffff", "#1d2026")
"""The page, and what pictures and tables lie on: light, dark."""
TEXT = ("#22252b", "#e8e6e1")
FAINT = ("#5d636e", "#a3a9b5")

INK = "#123456"
"""Drawn in the page's text colour: replaced in the SVG."""


def style_sheet() -> str:
    """The custom properties that ``themed`` names, for both schemes."""
    named = {"paper": PAPER, "card": CARD, "ink": TEXT, "faint": FAINT}
    named |= {f"series-{i}": pair for i, pair in enumerate(zip(LIGHT, DARK, strict=True), 1)}
    light, dark = (
        " ".join(f"--{name}: {pair[scheme]};" for name, pair in named.items()) for scheme in (0, 1)
    )
    # A page that is printed is a light one.
    return (
        f":root {{ {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    )


def themed(drawing: str) -> str:
    """SVG whose colours are those of the page around it, in the scheme that its reader prefers."""
    drawing = drawing.replace(INK, "currentColor")
    for number, colour in enumerate(LIGHT, 1):
        drawing = drawing.replace(colour, f"var(--series-{number})")
    return drawing
