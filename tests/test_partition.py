"""The primitive in programs that XLA splits: the communication, and the numbers.

Eight CPU devices stand for any eight. Shardings are written by the roles of dimensions:
{"N": "d"} cuts the images over mesh axis d.
"""

import functools
import itertools
import json
import math
import pathlib
import random

import jax
import numpy as np
import oracles
import pytest
from conftest import SEED
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_convgrad import conv_input_grad, sharding
from jax_convgrad.maps import FILTER_GRAD
from jax_convgrad.primitive import bind_filter_grad, bind_forward
from jax_convgrad.tools import references
from jax_convgrad.tools.collectives import Collective, collectives
from jax_convgrad.tools.geometries import (
    make_geometry,
    normwise_error,
    random_case,
    reduction_taps,
    tolerance,
)

pytestmark = pytest.mark.native

RECORDED = pathlib.Path(__file__).parents[1] / "benchmarks/results/communication.json"
ITEM = 4  # bytes of a float32


def mesh(**axes):
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def roles(g):
    """The letters of the dimensions of dy, the filter and dX; spatial axes are 0, 1 and 2."""
    result = []
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    for spec, ends in ((out_spec, "NK"), (rhs_spec, "KC"), (lhs_spec, "NC")):
        letters = [""] * len(spec)
        for dim, letter in zip(spec, ends + "012", strict=False):
            letters[dim] = letter
        result.append(letters)
    return result


def spec(letters, cut):
    return PartitionSpec(*(cut.get(letter) for letter in letters))


def program(g, devices, dy_cut, rhs_cut, dx_cut=None, **kwargs):
    """A jitted (dy, rhs) -> dX and the shardings of its operands."""
    dy, rhs, dx = roles(g)
    operands = [NamedSharding(devices, spec(*x)) for x in ((dy, dy_cut), (rhs, rhs_cut))]
    result = None if dx_cut is None else NamedSharding(devices, spec(dx, dx_cut))

    def input_grad(dy, rhs):
        return conv_input_grad(dy, rhs, g.lhs_shape, **g.conv_params(), **kwargs)

    return jax.jit(input_grad, in_shardings=operands, out_shardings=result), operands


def split(rng, g, devices, dy_cut, rhs_cut, dx_cut=None):
    """Compiles and runs dX over the devices; checks the numbers.

    Returns:
        dX, and the compiled program.
    """
    function, shardings = program(g, devices, dy_cut, rhs_cut, dx_cut)
    dy, rhs = oracles.operands(rng, g, "float32")
    compiled = function.lower(dy, rhs).compile()
    dx = compiled(*jax.device_put((dy, rhs), tuple(shardings)))
    error = normwise_error(dx, oracles.sliced_input_grad(dy, rhs, g))
    assert error <= tolerance("float32", reduction_taps(g)), (g, dy_cut, rhs_cut, dx_cut)
    return dx, compiled


LAYER = make_geometry((16, 16), (3, 3), (16, 32), batch=8, padding=1)
STRIDED = make_geometry((32, 16), (3, 3), (8, 16), batch=4, stride=2, padding="SAME")
PATCHES = make_geometry((32, 16), (4, 4), (8, 16), batch=4, stride=4)
GROUPED = make_geometry((8, 8), (3, 3), (32, 64), batch=8, padding=1, feature_groups=8)
BATCH_GROUPED = make_geometry((8, 8), (3, 3), (16, 32), batch=16, padding=1, batch_groups=8)
DILATED = make_geometry((32, 8), (3, 3), (4, 8), batch=2, padding=2, rhs_dilation=2)
CAUSAL = make_geometry((64,), (4,), (8, 8), batch=2, padding=((3, 0),), dimension_numbers="first")
TRANSPOSED = make_geometry((8, 8), (4, 4), (8, 8), batch=2, lhs_dilation=2, padding=2)
LONG_FILTER = make_geometry((16,), (7,), (4, 4), batch=2, padding=3)
SHORT_OUTPUT = make_geometry((24,), (17,), (4, 4), batch=2)
ONE = {"d": 8}
TWO = {"d": 4, "m": 2}


def rows_of_dy(g, rows, axis=0, *, parts=1, also=0):
    """Bytes of so many rows of a device's dy; `also` rows of halo on the other axis."""
    elements = math.prod(g.out_shape) // g.out_sizes[axis] // parts
    if also:
        other = g.out_sizes[1 - axis] // 4
        elements = elements // other * (other + also)
    return ITEM * rows * elements


def dx_bytes(g, parts=1):
    return ITEM * math.prod(g.lhs_shape) // parts


# name: geometry, mesh, how dy and the filter are cut, how dX comes out, the communication
# as (kind, bytes).
CASES = {
    "images": (LAYER, ONE, {"N": "d"}, {}, {"N": "d"}, []),
    "input channels": (LAYER, ONE, {}, {"C": "d"}, {"C": "d"}, []),
    "images and input channels": (
        LAYER, TWO, {"N": "d"}, {"C": "m"}, {"N": "d", "C": "m"}, [],
    ),
    "groups": (GROUPED, ONE, {"K": "d"}, {"K": "d"}, {"C": "d"}, []),
    "groups of dy alone": (GROUPED, ONE, {"K": "d"}, {}, {"C": "d"}, []),
    "images and groups": (
        GROUPED, TWO, {"N": "m", "K": "d"}, {"K": "d"}, {"N": "m", "C": "d"}, [],
    ),
    "batch groups": (BATCH_GROUPED, ONE, {"K": "d"}, {"K": "d"}, {"N": "d"}, []),
    "output channels": (
        LAYER, ONE, {"K": "d"}, {"K": "d"}, {}, [("all-reduce", dx_bytes(LAYER))],
    ),
    "images and output channels": (
        LAYER, TWO, {"N": "d", "K": "m"}, {"K": "m"}, {"N": "d"},
        [("all-reduce", dx_bytes(LAYER, 4))],
    ),
    "a filter cut like the images": (
        LAYER, ONE, {"N": "d"}, {"K": "d"}, {"N": "d"},
        [("all-gather", ITEM * math.prod(LAYER.rhs_shape))],
    ),
    "rows": (
        LAYER, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", rows_of_dy(LAYER, 1))] * 2,
    ),
    "rows, of dX alone": (
        LAYER, ONE, {}, {}, {"0": "d"}, [("collective-permute", rows_of_dy(LAYER, 1))] * 2,
    ),
    "columns of a channels-first layer": (
        make_geometry((4, 16), (3, 3), (4, 8), padding=1, dimension_numbers="first"),
        ONE, {"1": "d"}, {}, {"1": "d"},
        [("collective-permute", ITEM * 2 * 8 * 4)] * 2,
    ),
    "rows, stride 2": (
        STRIDED, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", rows_of_dy(STRIDED, 1))],
    ),
    "rows, stride as large as the filter": (PATCHES, ONE, {"0": "d"}, {}, {"0": "d"}, []),
    "rows, dilated filter": (
        DILATED, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", rows_of_dy(DILATED, 2))] * 2,
    ),
    "steps of a causal layer": (
        CAUSAL, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", rows_of_dy(CAUSAL, 3))],
    ),
    "rows, dilated input": (
        TRANSPOSED, TWO, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", rows_of_dy(TRANSPOSED, 1))] * 2,
    ),
    "rows over two axes of the mesh": (
        LAYER, TWO, {"0": ("d", "m")}, {}, {"0": ("d", "m")},
        [("collective-permute", rows_of_dy(LAYER, 1))] * 2,
    ),
    "rows over two axes in the other order": (
        LAYER, TWO, {"0": ("m", "d")}, {}, {"0": ("m", "d")},
        [("collective-permute", rows_of_dy(LAYER, 1))] * 2,
    ),
    "images and rows": (
        STRIDED, TWO, {"N": "d", "0": "m"}, {}, {"N": "d", "0": "m"},
        [("collective-permute", rows_of_dy(STRIDED, 1, parts=4))],
    ),
    "rows and columns": (
        LAYER, TWO, {"0": "d", "1": "m"}, {}, {"0": "d", "1": "m"},
        [("collective-permute", rows_of_dy(LAYER, 1, parts=2))] * 2
        + [("collective-permute", rows_of_dy(LAYER, 1, axis=1, parts=4, also=2))] * 2,
    ),
    "rows and output channels": (
        LAYER, TWO, {"0": "d", "K": "m"}, {"K": "m"}, {"0": "d"},
        [("all-reduce", dx_bytes(LAYER, 4))]
        + [("collective-permute", rows_of_dy(LAYER, 1, parts=2))] * 2,
    ),
    # What cannot stay as it is.
    "a halo beyond the neighbour": (
        LONG_FILTER, ONE, {"0": "d"}, {}, {}, [("all-gather", ITEM * 2 * 4 * 16)],
    ),
    "rows of dX that do not follow those of dy": (
        SHORT_OUTPUT, ONE, {"0": "d"}, {}, {}, [("all-gather", ITEM * 2 * 4 * 8)],
    ),
    "groups cut apart": (
        make_geometry((8,), (3,), (8, 16), padding=1, feature_groups=4), ONE,
        {"K": "d"}, {}, {}, [("all-gather", ITEM * 2 * 16 * 8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_communication(rng, name):
    g, axes, dy_cut, rhs_cut, dx_cut, expected = CASES[name]
    asked = dx_cut if name.endswith("alone") else None
    dx, compiled = split(rng, g, mesh(**axes), dy_cut, rhs_cut, asked)
    # The arrays of a device are small here: the kernel, and no convolution of XLA's.
    assert oracles.TARGET.strip("@(") in compiled.as_text()
    assert "convolution(" not in compiled.as_text()
    entries = dict(zip(roles(g)[2], dx.sharding.spec, strict=False))
    assert {letter: axes for letter, axes in entries.items() if axes} == dx_cut
    assert collectives(compiled) == sorted(Collective(*c) for c in expected)


def bytes_of_x(g, rows):
    """Bytes of so many rows of x."""
    return ITEM * rows * math.prod(g.lhs_shape) // g.in_sizes[0]


def y_bytes(g, parts=1):
    return ITEM * math.prod(g.out_shape) // parts


# The forward map: how x and the filter are cut, how y comes out.
FORWARD_CASES = {
    "images": (LAYER, ONE, {"N": "d"}, {}, {"N": "d"}, []),
    "output channels": (LAYER, ONE, {}, {"K": "d"}, {"K": "d"}, []),
    "images and output channels": (
        LAYER, TWO, {"N": "d"}, {"K": "m"}, {"N": "d", "K": "m"}, [],
    ),
    "groups": (GROUPED, ONE, {"C": "d"}, {"K": "d"}, {"K": "d"}, []),
    "batch groups": (BATCH_GROUPED, ONE, {"N": "d"}, {"K": "d"}, {"K": "d"}, []),
    "input channels": (
        LAYER, ONE, {"C": "d"}, {"C": "d"}, {}, [("all-reduce", y_bytes(LAYER))],
    ),
    "images and input channels": (
        LAYER, TWO, {"N": "d", "C": "m"}, {"C": "m"}, {"N": "d"},
        [("all-reduce", y_bytes(LAYER, 4))],
    ),
    "rows": (
        LAYER, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", bytes_of_x(LAYER, 1))] * 2,
    ),
    "rows, stride as large as the filter": (PATCHES, ONE, {"0": "d"}, {}, {"0": "d"}, []),
    "rows, dilated filter": (
        DILATED, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", bytes_of_x(DILATED, 2))] * 2,
    ),
    "rows, dilated input": (
        TRANSPOSED, TWO, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", bytes_of_x(TRANSPOSED, 1))] * 2,
    ),
    "steps of a causal layer": (
        CAUSAL, ONE, {"0": "d"}, {}, {"0": "d"},
        [("collective-permute", bytes_of_x(CAUSAL, 3))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_communication_of_the_forward_map(rng, name):
    g, axes, x_cut, rhs_cut, y_cut, expected = FORWARD_CASES[name]
    devices = mesh(**axes)
    y_letters, rhs_letters, x_letters = roles(g)
    shardings = [
        NamedSharding(devices, spec(*of)) for of in ((x_letters, x_cut), (rhs_letters, rhs_cut))
    ]
    x = rng.standard_normal(g.lhs_shape).astype(np.float32)
    w = rng.standard_normal(g.rhs_shape).astype(np.float32)
    forward = functools.partial(bind_forward, geometry=g)
    compiled = jax.jit(forward, in_shardings=shardings).lower(x, w).compile()
    y = compiled(*jax.device_put((x, w), tuple(shardings)))
    error = normwise_error(y, oracles.lax_conv(g)(x, w))
    assert error <= 2 * tolerance("float32", math.prod(g.rhs_shape))
    assert oracles.FORWARD_TARGET.strip("@(") in compiled.as_text()
    assert "convolution(" not in compiled.as_text()
    entries = dict(zip(y_letters, y.sharding.spec, strict=False))
    assert {letter: axes for letter, axes in entries.items() if axes} == y_cut
    assert collectives(compiled) == sorted(Collective(*c) for c in expected)


def filter_bytes(g, parts=1):
    return ITEM * math.prod(g.rhs_shape) // parts


# The filter gradient: how x and dy are cut, how dW comes out. Images and rows are summed over.
FILTER_CASES = {
    "images": (
        LAYER, ONE, {"N": "d"}, {"N": "d"}, {}, [("all-reduce", filter_bytes(LAYER))],
    ),
    "input channels": (LAYER, ONE, {"C": "d"}, {}, {"C": "d"}, []),
    "output channels": (LAYER, ONE, {}, {"K": "d"}, {"K": "d"}, []),
    "images and output channels": (
        LAYER, TWO, {"N": "d"}, {"N": "d", "K": "m"}, {"K": "m"},
        [("all-reduce", filter_bytes(LAYER, 2))],
    ),
    "groups": (GROUPED, ONE, {"C": "d"}, {"K": "d"}, {"K": "d"}, []),
    "batch groups": (BATCH_GROUPED, ONE, {"N": "d"}, {"K": "d"}, {"K": "d"}, []),
    "rows": (
        LAYER, ONE, {"0": "d"}, {"0": "d"}, {},
        [("collective-permute", bytes_of_x(LAYER, 1))] * 2
        + [("all-reduce", filter_bytes(LAYER))],
    ),
    "rows, stride as large as the filter": (
        PATCHES, ONE, {"0": "d"}, {"0": "d"}, {}, [("all-reduce", filter_bytes(PATCHES))],
    ),
    "rows, dilated filter": (
        DILATED, ONE, {"0": "d"}, {"0": "d"}, {},
        [("collective-permute", bytes_of_x(DILATED, 2))] * 2
        + [("all-reduce", filter_bytes(DILATED))],
    ),
    "images and rows": (
        LAYER, TWO, {"N": "d", "0": "m"}, {"N": "d", "0": "m"}, {},
        [("collective-permute", bytes_of_x(LAYER, 1) // 4)] * 2
        + [("all-reduce", filter_bytes(LAYER))],
    ),
    "steps of a causal layer": (
        CAUSAL, ONE, {"0": "d"}, {"0": "d"}, {},
        [("collective-permute", bytes_of_x(CAUSAL, 3)), ("all-reduce", filter_bytes(CAUSAL))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILTER_CASES)
def test_communication_of_the_filter_gradient(rng, name):
    g, axes, x_cut, y_cut, rhs_cut, expected = FILTER_CASES[name]
    devices = mesh(**axes)
    y_letters, rhs_letters, x_letters = roles(g)
    cuts = (x_letters, x_cut), (y_letters, y_cut), (rhs_letters, rhs_cut)
    *shardings, wanted = (NamedSharding(devices, spec(*of)) for of in cuts)
    x = rng.standard_normal(g.lhs_shape).astype(np.float32)
    dy = rng.standard_normal(g.out_shape).astype(np.float32)
    function = functools.partial(bind_filter_grad, geometry=g)
    compiled = jax.jit(function, in_shardings=shardings, out_shardings=wanted)
    compiled = compiled.lower(x, dy).compile()
    dw = compiled(*jax.device_put((x, dy), tuple(shardings)))
    error = normwise_error(dw, references.filter_grad(x, dy, g))
    assert error <= 2 * tolerance("float32", reduction_taps(g, FILTER_GRAD))
    assert oracles.FILTER_TARGET.strip("@(") in compiled.as_text()
    assert "convolution(" not in compiled.as_text()
    assert collectives(compiled) == sorted(Collective(*c) for c in expected)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "0" in case[4]])
def test_a_halo_is_no_more_than_its_share_of_dy(name):
    g, axes, _, _, dx_cut, expected = CASES[name]
    cut = dx_cut["0"] if isinstance(dx_cut["0"], tuple) else (dx_cut["0"],)
    edges = sharding.halo(g, 0, math.prod(axes[axis] for axis in cut))
    moved = sum(size for kind, size in expected if kind == "collective-permute")
    if "1" not in dx_cut:
        everything = ITEM * math.prod(g.out_shape)
        assert moved <= (edges.before + edges.after) / g.out_sizes[0] * everything


def test_documented_halos_are_what_the_formula_says():
    recorded = json.loads(RECORDED.read_text())
    rows = [row for row in recorded["rows"] if row["cut"] == "H"]
    assert rows
    for row in rows:
        x_shape, w_shape, stride, groups = recorded["layers"][row["layer"]]
        g = oracles.geometry(
            x_shape, w_shape, (stride,) * 2, "SAME", None, None, ("NHWC", "HWIO", "NHWC"), groups
        )
        edges = sharding.halo(g, 0, 8)
        size = rows_of_dy(g, edges.before + edges.after)
        number = (edges.before > 0) + (edges.after > 0)
        assert row["dX, ours"] == f"{number} collective-permute {size:,} B"


def cuttable(seed):
    """A random geometry whose sizes have many divisors."""
    draw = random.Random(seed)
    axes = draw.choice((1, 1, 2, 2, 3))
    spatial = tuple(draw.choice((8, 16, 24)) if a < 2 else 4 for a in range(axes))
    window = tuple(draw.randint(1, 5) for _ in spatial)
    stride = tuple(draw.choice((1, 1, 2, 4)) for _ in spatial)
    rhs_dilation = tuple(draw.choice((1, 1, 2)) for _ in spatial)
    lhs_dilation = tuple(draw.choice((1, 1, 1, 2)) for _ in spatial)
    padding = []
    for a in range(axes):
        # So that rows of dX follow those of dy, three times out of four.
        reach = (window[a] - 1) * rhs_dilation[a]
        low = draw.randint(-1, reach + 1)
        total = reach + lhs_dilation[a] - 1 - draw.randrange(stride[a])
        padding.append((low, total - low + draw.choice((0, 0, 0, 1))))
    kind = draw.choice(("dense", "dense", "feature_groups", "batch_groups"))
    groups = 1 if kind == "dense" else draw.choice((2, 4, 8))
    channels = [draw.choice((2, 4, 8)), draw.choice((2, 4, 8)) * groups]
    if kind == "feature_groups":
        channels[0] = groups * draw.choice((1, 2))
    return make_geometry(
        spatial,
        window,
        tuple(channels),
        batch=draw.choice((2, 4, 8)) * (groups if kind == "batch_groups" else 1),
        stride=stride,
        padding=tuple(padding),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=draw.choice(("first", "last", "odd")),
        **({} if kind == "dense" else {kind: groups}),
    )


def random_cut(draw, letters, shape, axes):
    """Mesh axes for some dimensions that they divide; now and then two for one."""
    cut = {}
    for name in draw.sample(list(axes), len(axes)):
        letter = draw.choice([*letters, None])
        if letter is None:
            continue
        names = (*cut.get(letter, ()), name)
        if shape[letters.index(letter)] % math.prod(axes[n] for n in names) == 0:
            cut[letter] = names
    return cut


def random_problem(index):
    """A geometry, a mesh, and any sharding of dy, the filter and dX at all."""
    draw = random.Random(f"{SEED}:{index}")
    while True:
        try:
            g = (
                cuttable(draw.random())
                if draw.random() < 0.8
                else random_case(SEED, draw.randrange(1 << 30)).geometry
            )
        except ValueError:  # padding took more than there is
            continue
        if 0 not in (*g.lhs_shape, *g.rhs_shape, *g.out_shape):
            break
    axes = draw.choice((ONE, TWO, {"a": 2, "b": 2, "c": 2}, {"a": 2, "b": 4}))
    shapes = g.out_shape, g.rhs_shape, g.lhs_shape
    cuts = [random_cut(draw, *x, axes) for x in zip(roles(g), shapes, strict=True)]
    if draw.random() < 0.4:
        cuts[2] = None
    return g, axes, *cuts


@pytest.mark.parametrize("index", range(24))
def test_any_sharding_gives_the_same_numbers(rng, index):
    g, axes, *cuts = random_problem(index)
    split(rng, g, mesh(**axes), *cuts)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(24, 400))
def test_any_sharding_gives_the_same_numbers_at_length(rng, index):
    g, axes, *cuts = random_problem(index)
    split(rng, g, mesh(**axes), *cuts)


def test_parts_put_together_are_the_whole(rng):
    """Cut by NumPy: the arithmetic of halos and paddings for every number of parts."""
    cut_somewhere = 0
    for index in range(50):
        g = cuttable_or_none(f"{SEED}:parts:{index}")
        if g is None:
            continue
        dy, rhs = oracles.operands(rng, g)
        whole = None
        for axis, parts in itertools.product(range(g.axes), (2, 4, 8)):
            edges = sharding.halo(g, axis, parts)
            if edges is None:
                continue
            whole = oracles.sliced_input_grad(dy, rhs, g) if whole is None else whole
            local = sharding.local_geometry(g, {f"s{axis}": parts})
            dim = g.dimension_numbers.out_spec[2 + axis]
            around = [(0, 0)] * dy.ndim
            around[dim] = (edges.before, edges.after)
            padded = np.pad(dy, around)
            rows = edges.before + edges.rows + edges.after
            pieces = [
                oracles.sliced_input_grad(
                    padded.take(range(i * edges.rows, i * edges.rows + rows), dim), rhs, local
                )
                for i in range(parts)
            ]
            dx = np.concatenate(pieces, g.dimension_numbers.lhs_spec[2 + axis])
            assert normwise_error(dx, whole) <= tolerance("float64", reduction_taps(g)), (g, parts)
            cut_somewhere += 1
    assert cut_somewhere > 15


def cuttable_or_none(seed):
    try:
        return cuttable(seed)
    except ValueError:
        return None
