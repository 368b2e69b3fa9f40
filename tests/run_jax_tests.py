"""Runs JAX's own convolution tests with the package in place of lax's input gradient.

    python tests/run_jax_tests.py JAX_CHECKOUT [--swap]

The checkout must be of the installed jax's version: `git checkout jax-v0.10.2` for jax
0.10.2. All tests named *Conv* of lax_test.py, lax_autodiff_test.py and lax_vmap_test.py
run twice, each time in a process of its own:

    plain    as they are, to know what fails without the package;
    install  with `jax_convgrad.install()`;

and with --swap a third time, where `jax.lax.conv_general_dilated` is this package's
function. That one is a `jax.custom_vjp`, which refuses forward mode by JAX's rule:
numerical checks are made in reverse mode only, and how many were left out is reported, as
are tests that need forward mode otherwise. Exits with 1 if any other test that passes plain fails,
or if no convolution reached the package's primitive.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

FILES = ("lax_test.py", "lax_autodiff_test.py", "lax_vmap_test.py")
# ConvertElementType is not about convolutions.
SELECTED = "Conv and not Convert"
FORWARD_MODE = re.compile(r"forward-mode \w+ \(jvp\) to a custom_vjp function")


def prepare(mode):
    """Puts the package in place; returns the counts of what reaches its primitive."""
    # The kernel wherever one covers the case, whatever the table of speeds says.
    os.environ["JAX_CONVGRAD"] = "on"
    import jax_convgrad
    from jax_convgrad import input_grad

    counts = collections.Counter()
    bind, lower = input_grad.conv_input_grad_p.bind, input_grad.dispatch.choose

    def counted_bind(*args, **params):
        counts["bound"] += 1
        return bind(*args, **params)

    def counted_choose(*args, **kwargs):
        choice = lower(*args, **kwargs)
        counts[choice.implementation] += 1
        return choice

    input_grad.conv_input_grad_p.bind = counted_bind
    input_grad.dispatch.choose = counted_choose
    if mode == "install":
        jax_convgrad.install()
    if mode == "swap":
        swap(jax_convgrad)
        reverse_only(counts)
    return counts


def reverse_only(counts):
    """Takes forward mode out of `check_grads`, and counts what was taken out."""
    import jax.test_util

    original = jax.test_util.check_grads

    def check_grads(f, args, order, modes=("fwd", "rev"), *rest, **kwargs):
        counts["forward checks left out"] += "fwd" in modes
        return original(f, args, order, ["rev"], *rest, **kwargs)

    jax.test_util.check_grads = check_grads


def swap(jax_convgrad):
    """Makes jax.lax.conv_general_dilated, and what lax builds on it, this package's."""
    import jax
    from jax._src.lax import convolution

    # In lax's own module too: conv, conv_transpose and others call it there.
    convolution.conv_general_dilated = jax_convgrad.conv_general_dilated
    jax.lax.conv_general_dilated = jax_convgrad.conv_general_dilated


def child(mode, checkout, report_path):
    """Runs the selected tests in this process and writes their outcomes."""
    import pytest

    counts = collections.Counter() if mode == "plain" else prepare(mode)
    outcomes = {}

    class Recorder:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome == "skipped":
                outcome = report.outcome
                if report.failed and FORWARD_MODE.search(str(report.longrepr)):
                    outcome = "forward mode"
                name = report.nodeid.replace("::", ".")
                outcomes[re.sub(r"^.*tests/", "", name)] = outcome

    tests = pathlib.Path(checkout).resolve() / "tests"
    # The checkout's own jax folder must not hide the installed one.
    os.chdir(tests)
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", SELECTED, "--rootdir", tests]
    status = pytest.main([*map(str, [*arguments, *FILES])], plugins=[Recorder()])
    report_path.write_text(
        json.dumps({"outcomes": outcomes, "counts": counts, "status": int(status)})
    )


def run(mode, checkout, verbose):
    """One mode in a process of its own; returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "report.json")
        command = [sys.executable, __file__, checkout, "--child", mode, "--report", str(path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if verbose or not path.exists():
            print(result.stdout[-20000:], result.stderr[-4000:], sep="\n")
        if not path.exists():
            sys.exit(f"{mode}: the test process died with status {result.returncode}")
        return json.loads(path.read_text())


def check_version(checkout):
    import jax

    text = pathlib.Path(checkout, "jax/version.py").read_text()
    found = re.search(r'^_version = "([\d.]+)"', text, re.MULTILINE)[1]
    if found != jax.__version__:
        print(f"warning: the checkout is jax {found}, the installed one {jax.__version__}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", help="a source tree of jax")
    parser.add_argument("--swap", action="store_true", help="also replace conv_general_dilated")
    parser.add_argument("--verbose", action="store_true", help="print the tests' own output")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.checkout, options.report)
        return 0
    version = check_version(options.checkout)
    plain = run("plain", options.checkout, options.verbose)["outcomes"]
    print(f"jax {version}, plain: {dict(collections.Counter(plain.values()))}")
    wrong = not plain
    for mode in ("install", "swap") if options.swap else ("install",):
        report = run(mode, options.checkout, options.verbose)
        outcomes, counts = report["outcomes"], report["counts"]
        print(f"jax {version}, {mode}: {dict(collections.Counter(outcomes.values()))}")
        print(
            f"  primitive bound {counts.get('bound', 0)} times; lowered {counts.get('native', 0)} "
            f"times to a kernel, {counts.get('xla', 0)} times through lax; "
            f"{counts.get('forward checks left out', 0)} forward-mode checks left out"
        )
        allowed = {"forward mode"} if mode == "swap" else set()
        broken = [
            name
            for name, outcome in plain.items()
            if outcome == "passed" and outcomes.get(name) not in {"passed", *allowed}
        ]
        for name in broken:
            print(f"  FAIL {name}: {outcomes.get(name)}")
        wrong |= bool(broken) or not counts.get("bound")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
