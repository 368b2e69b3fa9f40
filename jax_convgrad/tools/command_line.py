"""The command line: `python -m jax_convgrad {info,check,demo,bench,step,overhead,calibrate}`."""

from __future__ import annotations

import argparse
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from . import DTYPES, ToolError

_MAPS = "comma-separated: y, the forward pass, dx, the input gradient, and dw, the filter gradient"


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _count(text: str) -> int:
    value = _natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jax_convgrad", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what is installed and compiled, and what would run")

    check = commands.add_parser(
        "check", help="compare with the definition in float64 over many geometries"
    )
    check.add_argument("--map", dest="maps", metavar="MAPS",
                       help=f"{_MAPS} (default all, on a GPU dx)")  # fmt: skip
    check.add_argument(
        "--count", type=_natural, default=200, help="random geometries (default 200)"
    )
    check.add_argument("--dtype", choices=("all", *DTYPES), default="all")
    check.add_argument("--kernel", help="one kernel by name, on the geometries that it takes")
    check.add_argument("--seed", type=_natural, default=0)
    check.add_argument("--precision", choices=("default", "highest"), default="default")
    check.add_argument(
        "--require-native", action="store_true", help="fail if a case ran through lax"
    )

    commands.add_parser(
        "demo",
        help="train a small net on handwritten digits; takes the options of "
        "examples/train_digits.py",
    )

    bench = commands.add_parser("bench", help="time the gradient beside lax and PyTorch")
    _add_bench_options(bench)
    step = commands.add_parser("step", help="time a training step under lax and under install()")
    _add_step_options(step)
    overhead = commands.add_parser(
        "overhead", help="time tracing, calls outside of jit, and the import"
    )
    overhead.add_argument("--seconds", type=_positive, default=30.0,
        help="time to measure tracing, and again calls (default 30)")  # fmt: skip
    overhead.add_argument("--processes", type=_count, default=15,
        help="fresh processes that import the package (default 15)")  # fmt: skip
    overhead.add_argument(
        "--json", type=pathlib.Path, dest="json_path", help="write the results here"
    )
    calibrate = commands.add_parser(
        "calibrate", help="measure the CUDA kernels and correct the planner's model of them"
    )
    _add_calibrate_options(calibrate)
    return parser


def _add_calibrate_options(calibrate: argparse.ArgumentParser) -> None:
    add = calibrate.add_argument
    add("--write", type=pathlib.Path, dest="write_path", metavar="PATH",
        help="write the table here, csrc/cuda/rates.h (default: print it)")  # fmt: skip
    add("--json", type=pathlib.Path, dest="json_path", help="write the measurements here")
    add("--measurements", type=pathlib.Path, dest="measurements_path", metavar="PATH",
        help="fit the table to this JSON of an earlier run; needs no GPU")  # fmt: skip
    add("--seconds", type=_positive, default=600.0,
        help="begin no problem after this time (default 600)")  # fmt: skip
    add("--per-bound", type=_count, default=6, metavar="COUNT",
        help="problems for each row of the table that arithmetic bounds, and as many that "
        "memory does (default 6)")  # fmt: skip
    add("--row-seconds", type=_positive, default=0.2,
        help="time to measure one problem (default 0.2)")  # fmt: skip
    add("--seed", type=_natural, default=0)


def _add_step_options(step: argparse.ArgumentParser) -> None:
    add = step.add_argument
    add("--net", dest="nets", action="append", metavar="NAME",
        help="resnet18, convnext, resnet50 or convnext_tiny; may be repeated (default: the "
        "first two)")  # fmt: skip
    add("--dtype", choices=("f32", "bf16", "f16"), default="f32",
        help="of activations; parameters are float32 (default f32)")  # fmt: skip
    add("--batch", type=_count, default=8, help="images of a step (default 8)")
    add("--image", type=_count, default=64, help="their height and width (default 64)")
    add("--precision", choices=("default", "highest"), default="default",
        help="on a GPU, default lets float32 be TF32")  # fmt: skip
    add("--seconds", type=_positive, default=20.0, help="time to measure one net (default 20)")
    add("--seed", type=_natural, default=0)
    add("--json", type=pathlib.Path, dest="json_path", help="write the results here")
    add("--png", type=pathlib.Path, dest="png_path", help="draw them here")


def _add_bench_options(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add(
        "--layers",
        type=pathlib.Path,
        dest="layers_path",
        metavar="FILE",
        help="layers.json (default: the checkout's)",
    )
    add("--random", type=_count, metavar="COUNT",
        help="instead of layers, so many convolutions drawn over all that lax accepts, of any "
        "dtype and layout")  # fmt: skip
    add("--dtype", choices=tuple(DTYPES), help="default f32; with --random, any")
    add("--layout", choices=("NHWC", "NCHW"), default="NHWC",
        help="channels last with HWIO filters, or channels first with OIHW")  # fmt: skip
    add("--map", dest="maps", metavar="MAPS", help=f"{_MAPS} (default dx; with --random, any)")
    add("--peers", default="lax", help="comma-separated: lax,torch (default lax)")
    add("--class", dest="classes", action="append", metavar="NAME",
        help="only this class of layers; may be repeated")  # fmt: skip
    add("--per-class", type=_count, metavar="COUNT", help="at most COUNT layers of each class")
    add("--batch-budget", type=_positive, metavar="MFLOP",
        help="shrink the batch N of each layer until one gradient costs at most this many "
        "MFLOP, a byte of least memory traffic counting as 16 FLOP; N is at least 1")  # fmt: skip
    add("--implementation", choices=("auto", "native", "xla"), default="auto",
        help="native measures the kernel even where dispatch takes lax (default auto)")  # fmt: skip
    add("--precision", choices=("default", "highest"), default="default",
        help="on a GPU, default lets float32 be TF32, for every peer")  # fmt: skip
    add("--row-seconds", type=_positive, default=2.0, help="time to measure one row (default 2)")
    add("--scan", type=_count, metavar="STEPS",
        help="as the body of a lax.scan of so many steps")  # fmt: skip
    add("--limit", type=_count, help="only the first LIMIT rows")
    add("--seed", type=_natural, default=0)
    add("--json", type=pathlib.Path, dest="json_path", help="write the results here")
    add("--png", type=pathlib.Path, dest="png_path", help="draw them here")


def _run_demo(arguments: list[str]) -> int:
    package = pathlib.Path(__file__).resolve().parent.parent
    # The wheel brings the examples inside the package; a checkout has them beside it.
    for folder in (package / "examples", package.parent / "examples"):
        script = folder / "train_digits.py"
        if script.is_file():
            sys.argv = [str(script), *arguments]
            try:
                runpy.run_path(str(script), run_name="__main__")
            except ModuleNotFoundError as e:
                raise ToolError(
                    f"demo needs {e.name}, which is not installed: pip install 'jax-convgrad[demo]'"
                ) from None
            return 0
    raise ToolError("demo needs examples/train_digits.py, which this installation lacks")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments, None for those of the process.

    Returns:
        The exit status: 0, 1 for a wrong result, 2 for a request that cannot be served.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # The example parses its own options, --help among them.
    options = {"command": "demo"} if argv[:1] == ["demo"] else vars(_parser().parse_args(argv))
    command = options.pop("command")
    try:
        if command == "info":
            from . import info

            return info.main()
        if command == "check":
            from . import check

            return check.main(**options)
        if command == "bench":
            from . import bench

            return bench.main(**options)
        if command == "step":
            from . import step

            return step.main(**options)
        if command == "overhead":
            from . import overhead

            return overhead.main(**options)
        if command == "calibrate":
            from . import calibrate

            return calibrate.main(**options)
        return _run_demo(argv[1:])
    except ToolError as e:
        print(f"python -m jax_convgrad {command}: error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
