"""What the site's pages show as Python is run when the site is built, or is another library's and says so."""

import re

import pytest
from places import ROOT

DOCS = ROOT / "docs"
MADE = ("_build", "api", "gallery", "jupyter_execute")  # by the build
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if page.relative_to(DOCS).parts[0] not in MADE]
FENCE = re.compile(r"^(`{3,}|:{3,})(\{[\w-]+\}|[\w-]*)([^\n]*)$", re.M)
# Blocks that show no Python, or what is built from elsewhere.
SHOWN = {"sh", "text", "toml", "json", "yaml", "html", "{toctree}", "{include}", "{literalinclude}"}
LAID_OUT = {
    "{grid}",
    "{grid-item-card}",
    "{note}",
    "{warning}",
    "{tip}",
    "{tab-set}",
    "{tab-item}",
    "{dropdown}",
}
LAID_OUT |= {"{important}", "{admonition}", "{figure}", "{seealso}", "{list-table}", "{math}", "{eval-rst}"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_of_a_page_is_run(page):
    text = page.read_text()
    opening = [match for match in FENCE.finditer(text) if match[2]]
    for _, kind, rest in (match.groups() for match in opening):
        if kind == "{code-block}":  # another library's, under its name
            assert rest.strip() in ("python", "text"), f"{page.name}: {kind}{rest}"
            assert f"{kind} {rest.strip()}\n:caption: " in text, f"{page.name}: whose code is this?"
        else:
            assert kind in SHOWN | LAID_OUT | {"{code-cell}"}, f"{page.name}: {kind} is not run at build"
    if "{code-cell}" in text:
        assert text.startswith("---\nfile_format: mystnb\n"), f"{page.name} has cells, but is no notebook"


def test_pages_are_found():
    assert {"index.md", "quickstart.md"} <= {page.name for page in PAGES}
