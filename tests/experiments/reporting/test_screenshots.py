"""The report as a browser shows it: on a screen and on a telephone, light and dark, on paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from chromium import Chromium
from PIL import Image
from synthetic_results import probed, results_of, results_of_variant

from ritornello.experiments.recipes.recipe import Published, Recipe
from ritornello.experiments.reporting import report
from ritornello.experiments.results import metrics
from ritornello.experiments.results.groups import groups_of
from ritornello.experiments.results.writing import Results
from ritornello.experiments.training.variants import variants

pytestmark = pytest.mark.skipif(
    chromium.PATH is None, reason="needs Chromium: apt-get install chromium"
)

RECIPE = Recipe(
    name="a-data-set-whose-name-is-longer-than-anybody-can-remember-2024-05-17",
    description="Photographs_of_all_that_was_delivered_between_2019_and_2024_" * 2,
    data="digits",
    capacity=100,
    published=Published(85.6, 1.4, 10, "Somebody <et al.>, Table 2"),
)

SCREENS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]

SCROLLS = "[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)"
"""Whether some table has columns that are seen only when it is moved."""

WIDTHS = "[innerWidth, document.documentElement.scrollWidth]"

CUT = """(() => {
  const may_scroll = (e) => e.closest('.scroll, pre') !== null;
  const shown = (e) => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const elements = [...document.body.querySelectorAll('*')].filter(shown);
  const outside = elements.filter((e) => {
    const {left, right} = e.getBoundingClientRect();
    return !may_scroll(e) && (left < -0.5 || right > innerWidth + 0.5);
  });
  const overfull = elements.filter(
    (e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
      && !may_scroll(e) && getComputedStyle(e).display !== 'inline'
      && !(e instanceof SVGElement));
  const of_pictures = elements.filter((e) => e.matches('svg text')).filter((e) => {
    const text = e.getBoundingClientRect();
    const picture = e.closest('svg').getBoundingClientRect();
    return text.left < picture.left - 1 || text.right > picture.right + 1
      || text.top < picture.top - 1 || text.bottom > picture.bottom + 1;
  });
  return [...outside, ...overfull, ...of_pictures].map((e) => e.outerHTML.slice(0, 200));
})()"""
"""What stands outside the window or its own box. Tables and code scroll in theirs."""

SMALL = """[...document.querySelectorAll('svg text')].filter((e) => e.checkVisibility())
  .map((e) => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b))
  .reduce((a, b) => Math.min(a, b), 99)"""
"""The smallest letters of a picture, in pixels."""

FAINT = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = rgba(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (rgba(colour)[3] === 255) return colour;
    }
    throw 'no background';
  };
  const has_text = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const on_heat_map = (e) => e.closest('svg')?.querySelector('image')
    && ['rgb(0, 0, 0)', 'rgb(255, 255, 255)'].includes(getComputedStyle(e).fill);
  return [...document.body.querySelectorAll('*')]
    .filter((e) => e.checkVisibility() && has_text(e) && !on_heat_map(e))
    .map((e) => {
      const style = getComputedStyle(e);
      const pair = [luminance(e instanceof SVGElement ? style.fill : style.color),
                    luminance(background(e))].sort((a, b) => b - a);
      return [(pair[0] + 0.05) / (pair[1] + 0.05), e.outerHTML.slice(0, 200)];
    })
    .filter(([contrast]) => contrast < 4.5);
})()"""
"""Texts with less contrast than WCAG's level AA asks of small ones: 4.5."""

NUM_LOADED = """Promise.all([...document.querySelectorAll('image')].map(async (e) => {
  const image = new Image();
  image.src = e.href.baseVal;
  await image.decode();
  return image.naturalWidth > 1 && (!e.checkVisibility() || e.getBoundingClientRect().width > 5);
}))"""

COLOURS = """(() => {
  const line = document.querySelector('.charts svg [style*="--series-1"]');
  return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
          getComputedStyle(line).stroke, getComputedStyle(document.querySelector('.card')).backgroundColor];
})()"""


def long_results() -> list[Results]:
    """Of 20 tasks with 100 classes, several strategies, long names, two seeds, hours."""
    matrix = np.tril(0.97 - 0.03 * np.subtract.outer(np.arange(20), np.arange(20)))
    tasks = [
        {
            "name": ", ".join(f"a_class_with_a_long_name_{5 * i + c}" for c in range(5)),
            "classes": list(range(5 * i, 5 * i + 5)),
            "train_samples": 2500,
            "test_samples": 500,
        }
        for i in range(20)
    ]
    return [
        results_of_variant(
            replace(RECIPE, strategy=strategy, seed=seed),
            tasks=tasks,
            top1=matrix.tolist(),
            top5=matrix.tolist(),
            average_top1=metrics.average_accuracy(matrix),
            seconds=136_235.0,
            step_seconds={"load": 0.001, "wait": 0.004, "train": 1.234},
        )
        for strategy in ("incremental", "rehearsal", "der++")
        for seed in (0, 1)
    ]


NAMES = ("_a", "$b$", "<i>")


def odd_results() -> list[Results]:
    """One task; accuracies that were not measured; names that mean something elsewhere."""
    one = results_of("rehearsal", recipe="one")
    unknown = [[0.98, None, None], [0.9, 0.98, None], [None, 0.9, 0.98]]
    odd = results_of("rehearsal", recipe="<b>&$x$", top1=unknown)
    odd["tasks"] = [{**task, "name": name} for task, name in zip(odd["tasks"], NAMES, strict=True)]
    return [
        one | {"tasks": one["tasks"][:1], "top1": [[0.98]], "top5": [[1.0]]},
        odd,
        results_of("incremental", recipe="none", top1=[[None] * 3] * 3),
    ]


def probed_results() -> list[Results]:
    """With all columns and pictures that there can be."""
    recipe = replace(RECIPE, name="digits", holdout=0.1, tuned_on="a holdout")
    strategies = ("incremental", "rehearsal", "from-scratch")
    recipes = variants(recipe, strategies, class_orders=[0, 1], seeds=[0, 1]).values()
    return [probed(results_of_variant(each, average_averaged_top1=0.9)) for each in recipes]


PAGES: Mapping[str, Any] = {
    "comparison": lambda: [
        results_of(name, average_loss=12.416, forgetting_in_loss=15.397)
        for name in ("incremental", "rehearsal", "from-scratch")
    ],
    "long": long_results,
    "odd": odd_results,
    "probed": probed_results,
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in PAGES}
    for name, path in paths.items():
        report.write_report(groups_of(PAGES[name]()), path)
    return paths


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_page_fits_and_can_be_read(
    browser: Chromium, pages: dict[str, Path], name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    browser.show(pages[name], width, scheme)
    assert browser.evaluate(WIDTHS) == [width, width]
    assert browser.evaluate(CUT) == []
    assert browser.evaluate(FAINT) == []
    assert browser.evaluate(SMALL) >= 8.5
    if (name, width) == ("comparison", 1280):
        assert not browser.evaluate(SCROLLS)
    loaded = browser.evaluate(NUM_LOADED)
    assert all(loaded)
    assert len(loaded) == {"comparison": 3, "long": 3 + 3, "odd": 2, "probed": 3}[name]
    own, *others = browser.requests()
    assert own == pages[name].as_uri()
    assert all(each.startswith("data:") for each in others)

    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, browser.evaluate("document.documentElement.scrollHeight"))
        brightness = np.asarray(picture.convert("L"))
    assert (brightness.mean() > 220) if scheme == "light" else (brightness.mean() < 60)
    # Every hand's breadth of it shows something.
    assert all(each.std() > 1 for each in np.array_split(brightness, len(brightness) // 400))

    browser.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.evaluate(WIDTHS) == [width, width]
    assert browser.evaluate(CUT) == []
    assert browser.evaluate(FAINT) == []


def test_the_schemes_have_colours_of_their_own_and_paper_is_light(
    browser: Chromium, pages: dict[str, Path]
) -> None:
    shown = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        browser.show(pages["comparison"], 1280, scheme, media)
        shown[scheme, media] = browser.evaluate(COLOURS)
    light, dark, paper = shown.values()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    assert paper == ["rgb(255, 255, 255)", *light[1:]]
    # What is folded away cannot be opened on paper.
    meaning = "document.querySelector('.meaning dl').checkVisibility()"
    assert browser.evaluate(meaning)
    browser.show(pages["comparison"], 1280, "light")
    assert not browser.evaluate(meaning)


def test_a_screen_reader_finds_its_way(browser: Chromium, pages: dict[str, Path]) -> None:
    browser.show(pages["probed"], 1280, "light")
    count = "document.querySelectorAll({!r}).length"
    assert browser.evaluate("document.documentElement.lang") == "en"
    assert browser.evaluate(count.format("h1, main, header, footer")) == 4
    for each, without in (
        ("section", "section:not([aria-labelledby])"),
        ("svg", "svg:not([role=img][aria-label*=':'])"),
        ("th", "th:not([scope])"),
        ("table", "table:not(:has(caption))"),
        (".scroll", ".scroll:not([tabindex][role=region][aria-label])"),
    ):
        assert browser.evaluate(count.format(each)) > 0
        assert browser.evaluate(count.format(without)) == 0, without
    levels = browser.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))"
    )
    assert max(np.diff(levels)) == 1
    labels = browser.evaluate(
        "[...document.querySelectorAll('[aria-labelledby]')]"
        ".map((e) => document.getElementById(e.getAttribute('aria-labelledby')).textContent)"
    )
    assert labels[0] == "Results"


@pytest.mark.parametrize(
    ("change", "probe"),
    [
        ("document.querySelector('main').innerHTML += '<p style=\"width: 500px\">wide</p>'", CUT),
        (
            "document.querySelectorAll('svg text').forEach((e) => { e.style.fontSize = '99px'; })",
            CUT,
        ),
        ("document.querySelector('h1').style.color = 'var(--line)'", FAINT),
    ],
)
def test_the_probes_find_what_they_look_for(
    browser: Chromium, pages: dict[str, Path], change: str, probe: str
) -> None:
    browser.show(pages["comparison"], 390, "light")
    browser.evaluate(change)
    assert len(browser.evaluate(probe)) >= 1
