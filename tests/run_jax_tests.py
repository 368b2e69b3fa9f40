"""Runs JAX's own convolution tests with the package in place of lax's input gradient.

    python tests/run_jax_tests.py JAX_CHECKOUT [--results FOLDER] [--swap] [--files FILE ...]

The checkout must be of the installed jax's version: `git checkout jax-v0.10.2` for jax
0.10.2. All tests about convolutions of the files in `FILES` run twice, each file in a
process of its own:

    plain    as they are, to know what fails without the package;
    install  with `jax_convgrad.install()`;

and with --swap a third time, where `jax.lax.conv_general_dilated` is this package's
function. That one is a `jax.custom_vjp`, which refuses forward mode by JAX's rule:
numerical checks are made in reverse mode only, and how many were left out is reported, as
are tests that need forward mode otherwise. Exits with 1 if any other test that passes plain fails,
or if no convolution reached the package's primitive.

JAX draws the cases of most tests at random and takes 10 of each;
JAX_NUM_GENERATED_CASES=100 takes more. With --results the outcome of every test is kept
in that folder as it comes, and a run that was interrupted goes on where it stopped. They
are looked up by the versions and by the package's sources, so that a change of the
package runs its tests anew. A test that takes its process down is counted as dead, and
the next process goes on behind it.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import pytest

FILES = (
    "lax_test.py",
    "lax_autodiff_test.py",
    "lax_vmap_test.py",
    "batching_test.py",
    "pjit_test.py",
    "shard_map_test.py",
    "shape_poly_test.py",
    "export_harnesses_multi_platform_test.py",
    "jet_test.py",
    "stax_test.py",
    "scipy_signal_test.py",
    "lax_numpy_test.py",
    "sparse_bcoo_bcsr_test.py",
    "sparsify_test.py",
    "roofline_test.py",
)
# ConvertElementType is not about convolutions.
SELECTED = "Conv and not Convert"
FORWARD_MODE = re.compile(r"forward-mode \w+ \(jvp\) to a custom_vjp function")
PROGRESS_EVERY_S = 30


def prepare(mode):
    """Puts the package in place; returns the counts of what reaches its primitive."""
    # The kernel wherever one covers the case, whatever the table of speeds says.
    os.environ["JAX_CONVGRAD"] = "on"
    import jax_convgrad
    from jax_convgrad import dispatch, primitive

    counts = collections.Counter()
    bind, choose = primitive.conv_input_grad_p.bind, dispatch.choose

    def counted_bind(*args, **params):
        counts["bound"] += 1
        return bind(*args, **params)

    def counted_choose(*args, **kwargs):
        choice = choose(*args, **kwargs)
        counts[choice.implementation] += 1
        return choice

    primitive.conv_input_grad_p.bind = counted_bind
    dispatch.choose = counted_choose
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


def allow_rounding(module):
    """Widens the comparison of a program with its export, whose forward pass is lax's.

    Where JAX's shape_poly_test.py names no tolerance it asks for 1e-6, though the numbers are
    sums of 64 and more products of up to 100: the bits of one computation. JAX's own tolerance
    for two that differ is 5e-5.
    """
    for harness in getattr(module, "_POLY_SHAPE_TEST_HARNESSES", ()):
        if getattr(harness, "group_name", None) == "conv_general_dilated" and not harness.tol:
            harness.tol = 5e-5


def records(path):
    """What the processes before this one have written: a list of dictionaries."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError:  # interrupted in the middle of the last line
        return [json.loads(line) for line in lines[:-1]]


def outcomes_of(path):
    """{test: outcome} and the summed counts of a record."""
    outcomes, counts = {}, collections.Counter()
    for record in records(path):
        if "outcome" in record:
            outcomes[record["test"]] = record["outcome"]
            counts.update(record.get("counts", {}))
    return outcomes, counts


class Recorder:
    """A pytest plugin: writes every outcome as it comes, leaves out what is recorded."""

    def __init__(self, path, counts):
        self.path, self.counts = path, counts
        self.known = outcomes_of(path)[0]
        self.before = collections.Counter(counts)
        self.total = 0
        self.said = time.monotonic()
        self.outcome = None

    def write(self, **record):
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, items):
        self.total = len(items)
        for module in {item.module for item in items}:
            allow_rounding(module)
        items[:] = [item for item in items if item.nodeid not in self.known]

    def pytest_runtest_logstart(self, nodeid):
        self.outcome = None
        self.write(started=nodeid)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcome = report.outcome
            if report.failed and FORWARD_MODE.search(str(report.longrepr)):
                self.outcome = "forward mode"

    def pytest_runtest_logfinish(self, nodeid):
        counts = collections.Counter(self.counts)
        self.write(test=nodeid, outcome=self.outcome, counts=counts - self.before)
        self.before, self.known[nodeid] = counts, self.outcome
        if time.monotonic() - self.said > PROGRESS_EVERY_S:
            self.said = time.monotonic()
            tally = dict(collections.Counter(self.known.values()))
            print(f"    {len(self.known)} of {self.total}: {tally}", file=sys.stderr, flush=True)

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus != 2:  # interrupted
            self.write(finished=int(exitstatus))


def child(mode, file, record_path):
    """Runs the selected tests of one file in this process, in JAX's folder of tests."""
    counts = collections.Counter() if mode == "plain" else prepare(mode)
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", "-k", SELECTED, "--rootdir=.", file]
    return pytest.main(arguments, plugins=[Recorder(record_path, counts)])


def run_file(mode, file, checkout, record_path, verbose):
    """One file in as many processes as it takes down; returns outcomes and counts."""
    command = [sys.executable, os.path.abspath(__file__), str(checkout)]
    command += ["--child", mode, "--record", str(record_path), "--files", file]
    while not any("finished" in record for record in records(record_path)):
        before = len(records(record_path))
        # The checkout's own jax folder must not hide the installed one.
        folder = pathlib.Path(checkout, "tests")
        result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
        if verbose:
            print(result.stdout[-20000:])
        found = records(record_path)
        if len(found) == before:
            print(result.stdout[-20000:])
            sys.exit(f"{file}, {mode}: no test ran, status {result.returncode}")
        # Only this process can tell that the other one died: had both been stopped, nobody
        # would be here, and the test would be run again.
        if "started" in found[-1]:
            with record_path.open("a") as lines:
                lines.write(json.dumps({"test": found[-1]["started"], "outcome": "died"}) + "\n")
    return outcomes_of(record_path)


def fingerprint():
    """Of the installed package's files, compiled modules included."""
    import jax_convgrad

    digest = hashlib.sha256()
    for folder in map(pathlib.Path, jax_convgrad.__path__):
        for path in sorted([*folder.glob("*.py"), *folder.glob("*.so")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_version(checkout):
    import jax

    text = pathlib.Path(checkout, "jax/version.py").read_text()
    found = re.search(r'^_version = "([\d.]+)"', text, re.MULTILINE)[1]
    if found != jax.__version__:
        print(f"warning: the checkout is jax {found}, the installed one {jax.__version__}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path, help="a source tree of jax")
    parser.add_argument("--results", type=pathlib.Path, help="folder of outcomes, to go on later")
    parser.add_argument("--swap", action="store_true", help="also replace conv_general_dilated")
    parser.add_argument("--files", nargs="+", default=FILES, help="only these files of tests/")
    parser.add_argument("--verbose", action="store_true", help="print the tests' own output")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.files[0], options.record)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.results or pathlib.Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return compare(options, folder)


def compare(options, folder):
    """Every file in every mode, and what differs; returns the exit status."""
    version = check_version(options.checkout)
    cases = os.environ.get("JAX_NUM_GENERATED_CASES", "10")
    print(f"jax {version}, JAX_NUM_GENERATED_CASES={cases}")
    sources = {"plain": "", "install": fingerprint(), "swap": fingerprint()}
    tallies, totals, broken = collections.defaultdict(collections.Counter), {}, []
    modes = ("plain", "install", "swap") if options.swap else ("plain", "install")
    for file in options.files:
        if not (options.checkout / "tests" / file).exists():
            print(f"  {file} is not in this checkout")
            continue
        plain = {}
        for mode in modes:
            started = time.monotonic()
            key = "-".join(filter(None, (mode, sources[mode], version, cases, file)))
            record = folder / f"{key}.jsonl"
            found, counts = run_file(mode, file, options.checkout, record, options.verbose)
            plain = found if mode == "plain" else plain
            tally = collections.Counter(found.values())
            tallies[mode] += tally
            totals[mode] = totals.get(mode, collections.Counter()) + counts
            print(f"  {file}, {mode}: {describe(tally, counts, mode)}, "
                  f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
            allowed = {"passed"} | ({"forward mode"} if mode == "swap" else set())
            for name, outcome in plain.items():
                if outcome == "passed" and found.get(name) not in allowed:
                    broken.append(f"{name}, {mode}: {found.get(name)}")
                    print(f"  FAIL {broken[-1]}", flush=True)
    for mode in modes:
        print(f"jax {version}, {mode}: {describe(tallies[mode], totals.get(mode, {}), mode)}")
    reached = all(totals.get(mode, {}).get("bound") for mode in modes[1:])
    print(f"{len(broken)} tests pass only without the package")
    return int(bool(broken) or not reached)


def describe(tally, counts, mode):
    """One line of outcomes and, with the package, of what reached it."""
    text = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items()))
    if mode == "plain":
        return text or "no tests"
    text += (
        f"; primitive bound {counts.get('bound', 0)} times, lowered {counts.get('native', 0)} "
        f"times to a kernel, {counts.get('xla', 0)} times through lax"
    )
    if mode == "swap":
        text += f"; {counts.get('forward checks left out', 0)} forward-mode checks left out"
    return text


if __name__ == "__main__":
    sys.exit(main())
