"""Hooks of the documentation's site (mkdocs.yml).

The site's pages are those of docs/, the README as the first one, CONTRIBUTING and the changelog.
Files outside of docs/ that pages link to are copied to the site. Formulas become MathML, so that
no page needs a script.
"""

from __future__ import annotations

import html
import pathlib
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def _relinked(text: str, folder: pathlib.Path) -> tuple[str, set[str]]:
    """A page of a folder with the site's links, and the files outside of docs/ that it needs."""
    needed = set()

    def link(match: re.Match[str]) -> str:
        words, path, anchor = match.groups()
        target = (folder / path).resolve().relative_to(ROOT)
        if (ROOT / target).is_dir():
            return words
        if target.parts[0] == "docs":
            to = target.relative_to("docs").as_posix()
        elif (to := PAGES.get(target.as_posix(), "")) == "":
            needed.add(target.as_posix())
            to = f"repository/{target.as_posix()}"
        return f"[{words}]({to}{anchor or ''})"

    return _LINK.sub(link, text), needed


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages and files that do not lie in docs/."""
    needed = set()
    for source, page in PAGES.items():
        text, more = _relinked((ROOT / source).read_text(), ROOT)
        files.append(File.generated(config, page, content=text))
        needed |= more
    for page in files.documentation_pages():
        if page.src_uri not in PAGES.values():
            needed |= _relinked(page.content_string, ROOT / "docs")[1]
    for path in sorted(needed):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns links of the repository into the site's."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _relinked(markdown, ROOT / "docs")[0]


def on_page_content(text: str, **_: Any) -> str:
    """Turns TeX into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return _FORMULA.sub(formula, text)
