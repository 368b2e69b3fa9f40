"""What the tests compare with: the literal sum, lax in float64, and a kernel by name."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_convgrad import ConvGeometry, custom_call, native, planner, sharding
from jax_convgrad.maps import FILTER_GRAD, INPUT_GRAD, shape_of_role
from jax_convgrad.tools import references
from jax_convgrad.tools.geometries import (
    make_geometry,
    normwise_error,
    reduction_taps,
    tolerance,
)

DTYPES = ("float64", "float32", "bfloat16", "float16")
TARGET = f"@{native.TARGET}("
FUSED_TARGET = f"@{native.FUSED_TARGET}("
FORWARD_TARGET = f"@{native.FORWARD_TARGET}("
FILTER_TARGET = f"@{native.TARGETS[FILTER_GRAD]}("


def with_dtypes(names):
    """Parameters (name, dtype): each name with one of the four, the others in thorough tests.

    A name may be the index of a random case.
    """
    return [
        pytest.param(name, dtype, marks=[pytest.mark.thorough] if (i + j) % 4 else [])
        for i, name in enumerate(names)
        for j, dtype in enumerate(DTYPES)
    ]


def connected(g):
    """All (h, p, r), as index tuples over the spatial axes, that the convolution connects.

    The definition itself: h * lhs_dilation = p * stride - pad_low + r * rhs_dilation.
    """
    for p in itertools.product(*map(range, g.out_sizes)):
        for r in itertools.product(*map(range, g.window_sizes)):
            position = [
                p[a] * g.window_strides[a] - g.padding[a][0] + r[a] * g.rhs_dilation[a]
                for a in range(g.axes)
            ]
            h = tuple(x // d for x, d in zip(position, g.lhs_dilation, strict=True))
            if all(
                x % d == 0 and 0 <= i < size
                for x, d, i, size in zip(position, g.lhs_dilation, h, g.in_sizes, strict=True)
            ):
                yield h, p, r


def _literal(g, x, w, y, update):
    """Calls update for every index tuple of the trilinear form, roles of dimensions undone."""
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    x, w, y = x.transpose(lhs_spec), w.transpose(rhs_spec), y.transpose(out_spec)
    per_group = w.shape[0] // g.groups
    with np.errstate(invalid="ignore", over="ignore"):
        for h, p, r in connected(g):
            for n, k, c in itertools.product(range(y.shape[0]), *map(range, w.shape[:2])):
                image, channel = n, c
                if g.batch_group_count > 1:
                    image += k // per_group * y.shape[0]
                else:
                    channel += k // per_group * w.shape[1]
                update(x, w, y, (image, channel, *h), (k, c, *r), (n, k, *p))


def literal_input_grad(dy, w, g):
    """dX by one Python loop over the definition, in float64."""
    dx = np.zeros(g.lhs_shape)

    def update(x, w, y, i, j, k):
        x[i] += y[k] * w[j]

    _literal(g, dx, np.asarray(w, np.float64), np.asarray(dy, np.float64), update)
    return dx


def literal_forward(x, w, g):
    """The convolution by the same loop, in float64."""
    y = np.zeros(g.out_shape)

    def update(x, w, y, i, j, k):
        y[k] += x[i] * w[j]

    _literal(g, np.asarray(x, np.float64), np.asarray(w, np.float64), y, update)
    return y


def literal_filter_grad(x, dy, g):
    """dW by the same loop, in float64."""
    dw = np.zeros(g.rhs_shape)

    def update(x, w, y, i, j, k):
        w[j] += x[i] * y[k]

    _literal(g, np.asarray(x, np.float64), dw, np.asarray(dy, np.float64), update)
    return dw


def sliced_input_grad(dy, w, g):
    """dX in float64 by NumPy, a slice and a product for each tap: right and quick, not fast."""
    lhs_spec, rhs_spec, out_spec = g.dimension_numbers
    w = np.asarray(w, np.float64).transpose(rhs_spec)
    dy = np.asarray(dy, np.float64).transpose(out_spec)
    batch, groups, channels = dy.shape[0], g.groups, w.shape[1]
    # Group first: [groups, images, K, positions] and [groups, K, C, taps].
    per_group = w.shape[0] // groups
    w = w.reshape(groups, per_group, *w.shape[1:])
    dy = dy.reshape(batch, groups, per_group, *dy.shape[2:]).swapaxes(0, 1)
    dx = np.zeros((groups, batch, channels, *g.in_sizes))
    for r in itertools.product(*map(range, g.window_sizes)):
        put, taken = references.connected_by(g, r)
        products = np.einsum(
            "gnkp,gkc->gncp",
            dy[(..., *np.ix_(*taken))].reshape(*dy.shape[:3], math.prod(map(len, taken))),
            w[(..., *r)],
            optimize=True,
        )
        # No position comes twice for one tap.
        dx[(..., *np.ix_(*put))] += products.reshape(*products.shape[:3], *map(len, put))
    if g.batch_group_count > 1:
        dx = dx.reshape(groups * batch, channels, *g.in_sizes)
    else:
        dx = dx.swapaxes(0, 1).reshape(batch, groups * channels, *g.in_sizes)
    return dx.transpose(np.argsort(lhs_spec))


def lax_conv(g, **kwargs):
    """lax's own convolution of this geometry, as a function of (lhs, rhs)."""
    return functools.partial(lax.conv_general_dilated, **g.conv_params(), **kwargs)


@functools.partial(jax.jit, static_argnames="g")
def _lax_input_grad(dy, w, g):
    x = jax.ShapeDtypeStruct(g.lhs_shape, w.dtype)
    return jax.linear_transpose(lambda x: lax_conv(g)(x, w), x)(dy)[0]


def lax_input_grad(dy, w, g):
    """dX by lax's own transpose rule, in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        dx = _lax_input_grad(
            jnp.asarray(np.asarray(dy, np.float64)), jnp.asarray(np.asarray(w, np.float64)), g
        )
        return np.asarray(dx)


def operands(rng, g, dtype="float64", map_=INPUT_GRAD):
    """Standard normal operands of a map as NumPy arrays, rounded to the dtype."""
    shapes = [shape_of_role(g, role) for role in map_.operands]
    return tuple(rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)


def check_kernels(arrays, g, map_, expected):
    """Asserts that every kernel of a map is right, and that the planner's is one of them."""
    dtype = arrays[0].dtype.name
    bound = tolerance(dtype, reduction_taps(g, map_))
    results = call_kernels_of_map(arrays, g, map_)
    assert plan(g, dtype, map_=map_)[0] in results
    for name, out in results.items():
        error = normwise_error(out, expected)
        assert error <= bound, f"{name}: {error:.3e} above {bound:.3e} for {dtype} {g}"


def call_kernels_of_map(arrays, g, map_):
    """The result of every CPU kernel of a map, by name."""
    names = functools.partial(kernels_for, map_=map_)
    return call_kernels_of_many([(*arrays, g)], names, map_)[0]


def check_rules_of_bilinear_map(ours, theirs, a, b, target):
    """Each mapped operand, and derivatives of either order, in one custom call each.

    Args:
        ours: the map, of two operands, by its primitive.
        theirs: the same by lax.
        a: operand in float64.
        b: likewise.
        target: the custom call, as it is written in a lowered program.
    """
    loss = lambda f: lambda a, b: jnp.sum(jnp.sin(f(a, b)))  # noqa: E731
    many_a, many_b = jnp.stack([a, 2 * a, a - 1]), jnp.stack([b, b + 1, 3 * b])
    functions = {
        "value": lambda f: f(a, b),
        "grad": lambda f: jax.grad(loss(f), (0, 1))(a, b),
        "jvp": lambda f: jax.jvp(f, (a, b), (jnp.cos(a), jnp.sin(b))),
        "second": lambda f: jax.hessian(lambda s: loss(f)(s * a, b))(1.5),
        "third": lambda f: jax.grad(jax.hessian(lambda s: loss(f)(a, s * b)))(0.5),
        "vmap of the first": lambda f: jax.vmap(f, (0, None))(many_a, b),
        "vmap of the second": lambda f: jax.vmap(f, (None, 0))(a, many_b),
        "vmap of both": lambda f: jax.vmap(f)(many_a, many_b),
        "vmap at the end": lambda f: jax.vmap(f, (4, None), 3)(jnp.moveaxis(many_a, 0, 4), b),
        "vmap of none": lambda f: jax.vmap(f, (0, None))(many_a[:0], b),
    }
    for name, function in functions.items():
        actual, expected = jax.jit(lambda of=function: (of(ours), of(theirs)))()
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9, err_msg=name)
        if name.startswith("vmap") and name != "vmap of none":
            text = jax.jit(lambda of=function: of(ours)).lower().as_text()
            assert text.count(target) == 1, name


def cut_in_step(index):
    """A convolution whose first axis can be cut into 2, 4 and 8 parts of x and of y in step."""
    draw = np.random.default_rng(index)
    stride, dilation, window = (int(n) for n in draw.integers(1, 4, 3))
    size = 8 * int(draw.integers(1, 4)) * stride
    reach = (window - 1) * dilation
    low = int(draw.integers(0, reach + 1))
    # As many rows of y as make the cuts move in step.
    high = (size // stride - 1) * stride + reach + 1 - size - low
    return make_geometry(
        (size, 3), (window, 2), (3, 4), batch=2, stride=(stride, 1), rhs_dilation=(dilation, 1),
        padding=((low, high), (0, 1)), dimension_numbers="first",
    )  # fmt: skip


def parts_of_x(x, g, map_):
    """For each number of parts that have a halo: (parts, their geometry, rows of x with halos)."""
    for parts in (2, 4, 8):
        edges = sharding.halo(g, 0, parts, map_)
        if edges is None:
            continue
        padded = np.pad(x, ((0, 0), (0, 0), (edges.before, edges.after), (0, 0)))
        rows = edges.before + edges.rows + edges.after
        starts = range(0, parts * edges.rows, edges.rows)
        local = sharding.local_geometry(g, {"s0": parts}, map_)
        yield parts, local, [padded[:, :, at : at + rows] for at in starts]


def geometry(*args, **kwargs):
    """`ConvGeometry.parse`, by a short name for tables."""
    return ConvGeometry.parse(*args, **kwargs)


def plan(g, dtype, kernel="auto", platform="cpu", precision=None, map_=INPUT_GRAD):
    """The native planner's (kernel, workspace bytes), or None if the kernel does not fit."""
    try:
        planned = planner.plan(g, dtype, platform, precision, kernel, map_)
    except ValueError:
        return None
    return planned.kernel, planned.workspace_bytes


def kernels_for(g, dtype, platform="cpu", precision=None, map_=INPUT_GRAD):
    """Names of a platform's kernels that take this problem."""
    names = native.module_for(platform).kernel_names(map_.name)
    return [name for name in names if plan(g, dtype, name, platform, precision, map_) is not None]


def _call(first, second, g, planned, platform, precision, arrays=(), map_=INPUT_GRAD):
    """The result and the workspace of a plan (kernel, workspace bytes), as the kernel leaves them.

    With `arrays` the fused call: (residual, relu), of which either may have the shape (0,). Of no
    workspace (None) the call brings none.
    """
    kernel, workspace_bytes = planned
    layouts = custom_call.layouts(g, platform)
    to = layouts[map_.result]
    results = [jax.ShapeDtypeStruct(shape_of_role(g, map_.result), first.dtype)]
    if workspace_bytes is not None:
        results.append(jax.ShapeDtypeStruct((workspace_bytes,), np.uint8))
    call = jax.ffi.ffi_call(
        native.FUSED_TARGET if arrays else map_.target,
        results,
        input_layouts=[
            *(layouts[role] for role in map_.operands),
            *((0,) if x.shape == (0,) else to for x in arrays),
        ],
        output_layouts=[to, (0,)][: len(results)],
    )
    return call(first, second, *arrays, **custom_call.attributes(g, platform, precision, kernel))


def call_kernel(dy, w, g, kernel="auto", platform="cpu", precision=None, arrays=()):
    """dX by one kernel, by name, through the FFI custom call and past dispatch."""
    planned = plan(g, dy.dtype.name, kernel, platform, precision)
    assert planned is not None, (kernel, g)
    return _call(dy, w, g, (kernel, planned[1]), platform, precision, arrays)[0]


def finish(dx, residual=None, relu_mask=None):
    """The steps of an epilogue, written out."""
    if residual is not None:
        dx = dx + residual
    return dx if relu_mask is None else jnp.where(relu_mask > 0, dx, jnp.zeros_like(dx))


def every_kernel(g, dtype, platform="cpu", precision=None):
    """A jitted function of (dy, w): dX by every kernel that takes the problem, {name: dX}."""
    names = kernels_for(g, dtype, platform, precision)
    return jax.jit(
        lambda dy, w: {name: call_kernel(dy, w, g, name, platform, precision) for name in names}
    )


def call_kernels(dy, w, g, platform="cpu", precision=None):
    """What `every_kernel` computes, as NumPy arrays."""
    if platform == "cpu":
        return call_kernels_of_many([(dy, w, g)])[0]
    # Freed at once, so that the results are likely to land on NaNs.
    jnp.full((4, *g.lhs_shape), jnp.nan, dy.dtype).block_until_ready()
    outs = every_kernel(g, dy.dtype.name, platform, precision)(dy, w)
    return {name: np.asarray(out) for name, out in outs.items()}


def _poisoned(shape, dtype):
    """An array of 0xff bytes, which are NaNs, whose memory may be donated."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    values = np.full(count + 64, 0xFF, np.uint8)
    # Not aligned as JAX's arrays are, so that JAX copies it rather than shares it.
    start = (16 - values.ctypes.data) % 64
    values = values[start : start + count]
    return jax.device_put(values.view(dtype).reshape(shape))


def call_kernels_of_many(problems, kernels=kernels_for, map_=INPUT_GRAD):
    """The result of every CPU kernel that takes each problem, by one compiled program.

    The kernels write into memory that is poisoned, result and workspace alike.

    Args:
        problems: tuples of the map's operands and g.
        kernels: names of the kernels to call for a geometry and a dtype.
        map_: what they compute.

    Returns:
        A list as long as `problems`, of {name: result} as NumPy arrays.
    """
    planned = [
        {name: plan(g, dy.dtype.name, name, map_=map_)[1] for name in kernels(g, dy.dtype.name)}
        for dy, _, g in problems
    ]

    def call(poisoned, operands):
        del poisoned
        return [
            {
                name: tuple(_call(dy, w, g, (name, size), "cpu", None, map_=map_))
                for name, size in of.items()
            }
            for (dy, w), (_, _, g), of in zip(operands, problems, planned, strict=True)
        ]

    poisoned = [
        {name: (_poisoned(shape_of_role(g, map_.result), dy.dtype), _poisoned((size,), np.uint8))
         for name, size in of.items()}
        for (dy, _, g), of in zip(problems, planned, strict=True)
    ]  # fmt: skip

    def places(arrays):
        return sorted(x.unsafe_buffer_pointer() for x in jax.tree.leaves(arrays) if x.size)

    poisoned_at = places(poisoned)
    # XLA gives each result the memory of a donated argument of its type.
    program = jax.jit(call, donate_argnums=0, keep_unused=True)
    outs = program(poisoned, [(dy, w) for dy, w, _ in problems])
    assert places(outs) == poisoned_at
    return [{name: np.asarray(dx) for name, (dx, _) in out.items()} for out in outs]


def custom_calls(function, *args):
    """How many of this package's custom calls the lowered function holds."""
    return jax.jit(function).lower(*args).as_text().count(TARGET)
