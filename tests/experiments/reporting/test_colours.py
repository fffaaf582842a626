"""The colours can be told from the page and from each other, also by colour-blind readers."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from ritornello.experiments.reporting import colours, figures

Colour = NDArray[np.float64]

# Machado et al. (2009), A physiologically-based model for simulation of color vision deficiency,
# of full severity; they act on linear RGB.
SIGHTS = {
    "usual": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip

# Ottosson (2020), Oklab: equal distances look about equally large.
TO_CONES = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566], [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099], [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip


def linear(colour: str | tuple[float, ...]) -> Colour:
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def luminance(colour: str | tuple[float, ...]) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one: str | tuple[float, ...], other: str | tuple[float, ...]) -> float:
    """As WCAG defines it, from 1 to 21."""
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def distance(one: str, other: str, sight: NDArray[np.float64]) -> float:
    """In hundredths of Oklab's lightness; about 2 can just be told apart."""
    labs = [
        TO_LAB @ np.cbrt(TO_CONES @ np.clip(sight @ linear(each), 0, 1)) for each in (one, other)
    ]
    return 100 * float(np.linalg.norm(labs[0] - labs[1]))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out(scheme: int) -> None:
    series = (colours.LIGHT, colours.DARK)[scheme]
    for background in (colours.PAPER[scheme], colours.CARD[scheme]):
        assert contrast(colours.TEXT[scheme], background) >= 7  # AAA
        assert contrast(colours.FAINT[scheme], background) >= 4.5  # AA
        assert min(contrast(each, background) for each in series) >= 3  # AA, for graphics


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("series", [colours.LIGHT, colours.DARK], ids=["light", "dark"])
def test_lines_are_told_apart(series: tuple[str, ...], sight: str) -> None:
    pairs = itertools.combinations(series, 2)
    assert min(distance(*pair, SIGHTS[sight]) for pair in pairs) >= 8


def test_the_measure_knows_what_colour_blind_readers_confuse() -> None:
    assert distance("#d9662b", "#b08a1e", SIGHTS["usual"]) > 8
    assert distance("#d9662b", "#b08a1e", SIGHTS["deuteranopia"]) < 1


def test_numbers_stand_out_from_the_heat_map() -> None:
    for value in range(101):
        background = colormaps["viridis"](value / 100)[:3]
        assert contrast(figures.colour_on_heat_map(value), background) >= 4.5


def test_a_drawing_has_the_colours_of_its_page() -> None:
    drawing = f"<g style='fill: {colours.LIGHT[0]}; stroke: {colours.INK}'/>"
    assert colours.themed(drawing) == "<g style='fill: var(--series-1); stroke: currentColor'/>"
    light, dark = colours.style_sheet().splitlines()
    assert f"--series-7: {colours.LIGHT[6]};" in light
    assert f"--series-7: {colours.DARK[6]};" in dark
    names = [re.findall(r"(--[\w-]+):", each) for each in (light, dark)]
    assert names[0] == names[1]
