"""The code that users read: README blocks in order, and the docstrings' examples."""

import doctest
import inspect
import pathlib
import re

import jax
import pytest

import jax_convgrad

README = pathlib.Path(__file__).parents[1] / "README.md"

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


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_readme_blocks_run_in_order():
    blocks = readme_blocks()
    assert blocks
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{README.name}, python block {number}", "exec"), namespace)


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
