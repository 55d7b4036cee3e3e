"""The documentation: whole tables, links that lead somewhere, each configuration.

`.ci/run` builds the site, with warnings as errors.
"""

import re
from pathlib import Path

import pytest

from lco_jax.training.cli import names
from tools.docs_configs import configs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SITE_ONLY = {("faq.md", "quick-start.md#install")}  # the site puts README's sections there
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its blocks of code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The headings of a page, as GitHub and the site name them in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pages
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        name, _, anchor = link.partition("#")
        if "://" in link or (page.name, link) in SITE_ONLY:
            continue
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pages
def test_tables_are_whole(page):
    """Every row has as many cells as the first, and a table stands alone."""
    for paragraph in prose(page).split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        rows = [line for line in lines if line.startswith("|")]
        assert len(rows) in (0, len(lines)), paragraph
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, paragraph


def test_each_configuration_is_on_the_page():
    page = configs()
    for name in names():
        assert f"\n## {name}\n" in f"\n{page}"
    assert "| `model.quantize` | `''` | store the frozen decoder's matrices as int8" in page
