"""What the tests compare with: the literal sum, lax in float64, and a kernel by name."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_convgrad import ConvGeometry, custom_call, dispatch, native
from jax_convgrad.maps import FILTER_GRAD, INPUT_GRAD, shape_of_role

DTYPES = ("float64", "float32", "bfloat16", "float16")
TARGET = f"@{native.TARGET}("
FUSED_TARGET = f"@{native.FUSED_TARGET}("
FORWARD_TARGET = f"@{native.FORWARD_TARGET}("
FILTER_TARGET = f"@{native.TARGETS[FILTER_GRAD]}("


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
        taken, put = [], []
        for a, tap in enumerate(r):
            p = np.arange(g.out_sizes[a])
            at = p * g.window_strides[a] - g.padding[a][0] + tap * g.rhs_dilation[a]
            d = g.lhs_dilation[a]
            inside = (at >= 0) & (at % d == 0) & (at // d < g.in_sizes[a])
            taken.append(p[inside])
            put.append(at[inside] // d)
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


def operands(rng, g, dtype="float64"):
    """Standard normal dy and w as NumPy arrays, rounded to the dtype."""
    dy, w = rng.standard_normal(g.out_shape), rng.standard_normal(g.rhs_shape)
    return dy.astype(jnp.dtype(dtype)), w.astype(jnp.dtype(dtype))


def geometry(*args, **kwargs):
    """`ConvGeometry.parse`, by a short name for tables."""
    return ConvGeometry.parse(*args, **kwargs)


def plan(g, dtype, kernel="auto", platform="cpu", precision=None, map_=INPUT_GRAD):
    """The native planner's (kernel, workspace bytes), or None if the kernel does not fit."""
    try:
        planned = dispatch.plan(g, dtype, platform, precision, kernel, map_)
    except ValueError:
        return None
    return planned.kernel, planned.workspace_bytes


def kernels_for(g, dtype, platform="cpu", precision=None, map_=INPUT_GRAD):
    """Names of a platform's kernels that take this problem."""
    names = native.module_for(platform).kernel_names(map_.name)
    return [name for name in names if plan(g, dtype, name, platform, precision, map_) is not None]


def _call(first, second, g, planned, platform, precision, arrays=(), map_=INPUT_GRAD):
    """The result and the workspace of a plan (kernel, workspace bytes), as the kernel leaves them.

    With `arrays` the fused call: (residual, relu), of which either may have the shape (0,).
    """
    kernel, workspace_bytes = planned
    layouts = custom_call.layouts(g, platform)
    to = layouts[map_.result]
    results = (
        jax.ShapeDtypeStruct(shape_of_role(g, map_.result), first.dtype),
        jax.ShapeDtypeStruct((workspace_bytes,), np.uint8),
    )
    call = jax.ffi.ffi_call(
        native.FUSED_TARGET if arrays else map_.target,
        results,
        input_layouts=[
            *(layouts[role] for role in map_.operands),
            *((0,) if x.shape == (0,) else to for x in arrays),
        ],
        output_layouts=[to, (0,)],
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
