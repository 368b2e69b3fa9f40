"""What users read: the Python and the links of every page, and the docstrings' examples."""

import doctest
import inspect
import pathlib
import re
import runpy

import jax
import pytest

import jax_convgrad

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

DOCUMENTED = [
    jax_convgrad.conv_general_dilated,
    jax_convgrad.conv_input_grad,
    jax_convgrad.conv_transpose,
    jax_convgrad.explain,
    jax_convgrad.install,
    jax_convgrad.installed,
]


@pytest.fixture(autouse=True)
def uninstalled():
    yield
    jax_convgrad.uninstall()


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda f: f.__name__)
def test_example_of_the_docstring(function):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(function, function.__name__, globs=dict(function.__globals__))
    assert test.examples, "every public function shows its use"
    report = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_of_a_page_runs_in_order(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks or page.name != "README.md"
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in headings}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_pictures_are_what_their_script_draws():
    folder = ROOT / "docs" / "pictures"
    pictures = runpy.run_path(str(folder / "draw.py"))["PICTURES"]
    assert {path.stem for path in folder.glob("*.svg")} == set(pictures)
    for name, draw in pictures.items():
        assert (folder / f"{name}.svg").read_text() == draw(), f"{name}: run docs/pictures/draw.py"


@pytest.mark.parametrize("name", jax_convgrad.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(jax_convgrad, name)
    if name != "__version__":
        assert value.__doc__
        assert len(value.__doc__.split()) > 5


def test_signatures_are_those_of_lax():
    """Code moves between the two by its import alone."""
    for name in ("conv_general_dilated", "conv_transpose"):
        ours = inspect.signature(getattr(jax_convgrad, name)).parameters
        theirs = inspect.signature(getattr(jax.lax, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        extra = [p for p in ours.values() if p.name not in theirs]
        assert [p.name for p in extra] == ["implementation"]
        assert extra[0].kind is inspect.Parameter.KEYWORD_ONLY
        for parameter in theirs.values():
            assert ours[parameter.name].default == parameter.default
            assert ours[parameter.name].kind == parameter.kind
