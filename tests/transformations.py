"""What JAX can do to a convolution, as one table of functions.

Each function takes a convolution `conv(x, w)`, its operands x and w and a cotangent dy of
its result, applies a transformation and returns arrays. `test_matrix.py` calls every one of
them with this package's convolutions and with lax's. New arrays are made from the operands
by sums and by factors that are powers of two, which round in no dtype.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify

policies = jax.checkpoint_policies


@dataclasses.dataclass(frozen=True)
class Transformation:
    """A row of the table.

    Attributes:
        name: part of a test's id.
        function: of (conv, x, w, dy), returns arrays.
        depth: results that are rounded one after the other, each from the one before it.
        eager: needs concrete arrays; the other functions are compiled as a whole.
        forward_mode: differentiates the convolution itself in forward mode, which a
            custom_vjp refuses and lax's convolution does not.
        input_grad: by this package's primitive, unless lax is asked for.
    """

    name: str
    function: Callable
    depth: int = 2
    eager: bool = False
    forward_mode: bool = False
    input_grad: bool = True


TRANSFORMATIONS: list[Transformation] = []


def row(name=None, **attributes):
    """Puts a function into the table, under its own name without another one."""

    def add(function):
        TRANSFORMATIONS.append(Transformation(name or function.__name__, function, **attributes))
        return function

    return add


def loss(conv):
    """A loss with derivatives of every order, in x and in w and mixed."""
    return lambda x, w: jnp.sum(conv(x, w) ** 2) / 2


def gradient(conv, argnums=(0, 1)):
    return jax.grad(loss(conv), argnums)


def stacked(x, axis=0):
    """Three different multiples of an array."""
    return jnp.stack([x, -2 * x, x / 2], axis)


def mean_square(tree):
    return sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(tree)) / 2


# --- reverse and forward mode, in every order


@row(eager=True)
def grad(conv, x, w, dy):
    return gradient(conv)(x, w)


@row()
def jit_of_grad(conv, x, w, dy):
    return jax.jit(gradient(conv))(x, w)


@row()
def grad_of_jit(conv, x, w, dy):
    return gradient(jax.jit(conv))(x, w)


@row()
def value_and_grad(conv, x, w, dy):
    return jax.value_and_grad(loss(conv), (0, 1))(x, w)


@row()
def grad_with_aux(conv, x, w, dy):
    def with_aux(x, w):
        y = conv(x, w)
        return jnp.sum(y * dy), y

    return jax.grad(with_aux, (0, 1), has_aux=True)(x, w)


@row()
def vjp_called_twice(conv, x, w, dy):
    _, vjp = jax.vjp(conv, x, w)
    return vjp(dy), vjp(-2 * dy)


@row(depth=4)
def reverse_over_reverse(conv, x, w, dy):
    return jax.grad(lambda x, w: mean_square(gradient(conv)(x, w)), (0, 1))(x, w)


@row(depth=6)
def third_order_reverse(conv, x, w, dy):
    def second(x, w):
        return mean_square(jax.grad(lambda x, w: mean_square(gradient(conv)(x, w)), (0, 1))(x, w))

    return jax.grad(second, (0, 1))(x, w)


@row(depth=4)
def forward_over_reverse(conv, x, w, dy):
    return jax.jvp(gradient(conv), (x, w), (jnp.flip(x), 2 * jnp.flip(w)))


@row(depth=4)
def linearize_of_grad(conv, x, w, dy):
    _, product = jax.linearize(gradient(conv), x, w)
    return product(jnp.flip(x), jnp.flip(w)), product(x, -w)


@row(depth=6)
def reverse_over_forward_over_reverse(conv, x, w, dy):
    def curvature(x, w):
        return mean_square(jax.jvp(gradient(conv), (x, w), (jnp.flip(x), jnp.flip(w)))[1])

    return jax.grad(curvature, (0, 1))(x, w)


@row()
def hessian(conv, x, w, dy):
    return jax.hessian(loss(conv), (0, 1))(x, w)


@row()
def jacrev(conv, x, w, dy):
    return jax.jacrev(conv, (0, 1))(x, w)


@row()
def jacrev_of_jacrev(conv, x, w, dy):
    return jax.jacrev(jax.jacrev(loss(conv)), 1)(x, w)


@row()
def jacfwd_of_grad(conv, x, w, dy):
    return jax.jacfwd(gradient(conv, 0), (0, 1))(x, w)


@row()
def linear_transpose_of_vjp(conv, x, w, dy):
    _, vjp = jax.vjp(lambda x: conv(x, w), x)
    return jax.linear_transpose(lambda dy: vjp(dy)[0], dy)(x), vjp(dy)


@row(forward_mode=True, input_grad=False)
def jvp(conv, x, w, dy):
    return jax.jvp(conv, (x, w), (jnp.flip(x), 2 * w))


@row(forward_mode=True, input_grad=False)
def jacfwd(conv, x, w, dy):
    return jax.jacfwd(conv, (0, 1))(x, w)


@row(forward_mode=True, input_grad=False)
def linearize(conv, x, w, dy):
    y, linear = jax.linearize(conv, x, w)
    return y, linear(jnp.flip(x), w), linear(x, jnp.flip(w))


@row(forward_mode=True)
def linear_transpose(conv, x, w, dy):
    return (
        jax.linear_transpose(lambda x: conv(x, w), x)(dy),
        jax.linear_transpose(lambda w: conv(x, w), w)(dy),
    )


@row(forward_mode=True, depth=4)
def jvp_of_jvp_of_grad(conv, x, w, dy):
    def twice(x, w):
        return jax.jvp(conv, (x, w), (jnp.flip(x), w))[1]

    return jax.jvp(gradient(twice), (x, w), (x, jnp.flip(w)))


# --- custom rules around it


@row()
def custom_vjp_around(conv, x, w, dy):
    @jax.custom_vjp
    def clipped(x, w):
        return conv(x, w)

    clipped.defvjp(lambda x, w: jax.vjp(conv, x, w), lambda vjp, dy: vjp(dy / 2))
    return gradient(clipped)(x, w)


@row()
def custom_jvp_inside_and_around(conv, x, w, dy):
    @jax.custom_jvp
    def doubled(y):
        return 2 * y

    doubled.defjvp(lambda primals, tangents: (2 * primals[0], 4 * tangents[0]))
    return gradient(lambda x, w: doubled(conv(doubled(x), w)))(x, w)


@row(forward_mode=True)
def custom_jvp_whose_rule_convolves(conv, x, w, dy):
    @jax.custom_jvp
    def product(x, w):
        return conv(x, w)

    @product.defjvp
    def _(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        return product(x, w), conv(dx, w) + 2 * conv(x, dw)

    return gradient(product)(x, w), jax.jvp(product, (x, w), (x, w))


@row()
def custom_gradient(conv, x, w, dy):
    @jax.custom_gradient
    def reversed_sign(x, w):
        y, vjp = jax.vjp(conv, x, w)
        return y, lambda dy: jax.tree.map(jnp.negative, vjp(dy))

    return gradient(reversed_sign)(x, w)


@row()
def closure_convert(conv, x, w, dy):
    converted, consts = jax.closure_convert(lambda x: conv(x, 2 * w), x)
    return jax.grad(lambda x, consts: jnp.sum(converted(x, *consts) ** 2), (0, 1))(x, consts)


@row()
def stop_gradient_of_either(conv, x, w, dy):
    stop = lax.stop_gradient
    return gradient(lambda x, w: conv(stop(x), w) + conv(x, stop(2 * w)))(x, w)


# --- rematerialisation


def names_the_convolution(prim, *_, **__):
    """A policy that keeps what the convolution and its input gradient compute."""
    return prim.name in ("conv_general_dilated", "conv_input_grad")


POLICIES = {
    "default": None,
    "nothing": policies.nothing_saveable,
    "everything": policies.everything_saveable,
    "dots": policies.dots_saveable,
    "dots_without_batch": policies.dots_with_no_batch_dims_saveable,
    "names": policies.save_only_these_names("y"),
    "any_names_but": policies.save_any_names_but_these("y"),
    "convolution": names_the_convolution,
    "dots_or_convolution": policies.save_from_both_policies(
        policies.dots_saveable, names_the_convolution
    ),
}


def checkpointed(policy, conv, x, w, dy):
    @functools.partial(jax.checkpoint, policy=policy)
    def block(x, w):
        return dy * checkpoint_name(conv(2 * x, w), "y")

    return gradient(block)(x, w)


for _name, _policy in POLICIES.items():
    row(f"checkpoint_{_name}", depth=3)(functools.partial(checkpointed, _policy))


@row()
def checkpoint_of_checkpoint(conv, x, w, dy):
    return gradient(jax.checkpoint(lambda x, w: 2 * jax.checkpoint(conv)(x, w)))(x, w)


@row(depth=4)
def checkpoint_of_grad(conv, x, w, dy):
    inner = jax.checkpoint(gradient(conv), policy=names_the_convolution)
    return jax.grad(lambda x, w: mean_square(inner(x, w)), (0, 1))(x, w)


# --- control flow


@row(depth=4)
def scan_over_filters(conv, x, w, dy):
    def total(x, w):
        def step(sum_, w):
            return sum_ + loss(conv)(x, w), None

        return lax.scan(step, jnp.zeros((), x.dtype), stacked(w))[0]

    return jax.grad(total, (0, 1))(x, w)


@row(depth=4)
def scan_of_grad(conv, x, w, dy):
    def step(carry, _):
        x, w = carry
        dx, dw = gradient(conv)(x, w)
        return (x - dx / 64, w - dw / 64), jnp.max(dx)

    return lax.scan(step, (x, w), None, length=3)


@row(depth=4)
def scan_of_checkpoint(conv, x, w, dy):
    def total(x, w):
        block = jax.checkpoint(lambda x, w: loss(conv)(x, w), prevent_cse=False)
        return lax.scan(lambda s, w: (s + block(x, w), None), jnp.zeros((), x.dtype), stacked(w))[0]

    return jax.grad(total, (0, 1))(x, w)


@row(depth=6, input_grad=False)
def grad_of_scan_of_grad(conv, x, w, dy):
    def trained(x, w):
        step = lambda w, _: (w - gradient(conv, 1)(x, w) / 64, None)  # noqa: E731
        return mean_square(lax.scan(step, w, None, length=2, unroll=2)[0])

    return jax.grad(trained, (0, 1))(x, w)


@row(depth=4)
def while_of_grad(conv, x, w, dy):
    def body(state):
        i, x = state
        return i + 1, x - gradient(conv, 0)(x, w) / 64

    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))


@row(depth=4)
def fori_of_grad(conv, x, w, dy):
    return lax.fori_loop(0, x.shape[0], lambda i, x: x - gradient(conv, 0)(x, w) / 64, x)


@row(depth=4)
def grad_of_fori(conv, x, w, dy):
    def total(x, w):
        body = lambda i, s: s + loss(conv)((i + 1).astype(x.dtype) * x, w)  # noqa: E731
        return lax.fori_loop(0, 2, body, jnp.zeros((), x.dtype))

    return jax.grad(total, (0, 1))(x, w)


@row()
def grad_of_cond(conv, x, w, dy):
    def either(x, w, flag):
        return lax.cond(flag, loss(conv), lambda x, w: jnp.sum(x) + jnp.sum(w), x, w)

    function = jax.grad(either, (0, 1))
    positive = jnp.sum(x) > 0
    return function(x, w, positive), function(x, w, ~positive)


@row()
def cond_of_grad(conv, x, w, dy):
    return lax.cond(jnp.sum(x) > 0, gradient(conv), lambda x, w: (x, w), x, w)


@row()
def vmap_of_cond_of_grad(conv, x, w, dy):
    def either(flag, x):
        return lax.cond(flag, lambda x: gradient(conv, 0)(x, w), lambda x: x, x)

    return jax.vmap(either)(jnp.array([True, False, True]), stacked(x))


@row()
def switch(conv, x, w, dy):
    branches = [lambda x, w, k=k: loss(conv)(k * x, w) for k in (1, 2)]
    function = jax.grad(lambda x, w, i: lax.switch(i, branches, x, w), (0, 1))
    first = (jnp.sum(x) > 0).astype("int32")
    return function(x, w, first), function(x, w, 1 - first)


@row()
def map_(conv, x, w, dy):
    return lax.map(lambda w: gradient(conv)(x, w), stacked(w))


@row()
def map_in_batches(conv, x, w, dy):
    return lax.map(lambda x: gradient(conv, 0)(x, w), stacked(x), batch_size=2)


@row(depth=4)
def associative_scan(conv, x, w, dy):
    def total(x, w):
        ys = lax.map(lambda w: conv(x, w), stacked(w))
        return mean_square(lax.associative_scan(jnp.add, ys))

    return jax.grad(total, (0, 1))(x, w)


# --- vmap


def mapped_vjp(axes, out_axes, conv, x, w, dy):
    """vmap of a vjp: axes of dy, x and w, None for an operand that is not mapped."""

    def gradients(dy, x, w):
        return jax.vjp(conv, x, w)[1](dy)

    operands = [
        a if axis is None else stacked(a, axis) for a, axis in zip((dy, x, w), axes, strict=True)
    ]
    return jax.vmap(gradients, in_axes=axes, out_axes=out_axes)(*operands)


def mapped_axes():
    """Every combination of mapped operands, axes from the front, the middle and the end."""
    positions = itertools.cycle((0, -1, 1, 2, -2, -3))
    for which in itertools.product((False, True), repeat=3):
        if any(which):
            yield tuple(next(positions) if mapped else None for mapped in which)


for _index, _axes in enumerate(mapped_axes()):
    _operands = "".join(
        f"_{n}{a}" for n, a in zip(("dy", "x", "w"), _axes, strict=True) if a is not None
    )
    row(f"vmap_of_vjp{_operands}")(
        functools.partial(mapped_vjp, _axes, (0, -1, (1, 0), (-2, 2))[_index % 4])
    )


def grad_of_vmap(axes, conv, x, w, dy):
    batched = jax.vmap(conv, in_axes=axes, out_axes=1)

    def total(x, w):
        x, w = (
            a if axis is None else stacked(a, axis) for a, axis in zip((x, w), axes, strict=True)
        )
        return mean_square(batched(x, w))

    return jax.grad(total, (0, 1))(x, w)


for _axes in ((0, None), (-1, None), (None, 0), (None, -1), (0, 0), (1, -2)):
    row("grad_of_vmap_" + "_".join(map(str, _axes)), depth=3)(
        functools.partial(grad_of_vmap, _axes)
    )


@row()
def vmap_of_vmap_of_grad(conv, x, w, dy):
    return jax.vmap(jax.vmap(gradient(conv), (None, 0)), (0, None))(stacked(x), stacked(w))


@row()
def vmap_of_vmap_of_both(conv, x, w, dy):
    both = jax.vmap(jax.vmap(gradient(conv)), (-1, 1))
    return both(stacked(stacked(x), -1), stacked(stacked(w), 1))


@row()
def vmap_of_grad_of_vmap(conv, x, w, dy):
    inner = lambda x, w: jnp.sum(jax.vmap(conv, (None, 0))(x, w) ** 2)  # noqa: E731
    return jax.vmap(jax.grad(inner, (0, 1)), (0, None))(stacked(x), stacked(w))


@row(eager=True)
def vmap_of_nothing(conv, x, w, dy):
    none = slice(0, 0)
    return [
        jax.vmap(gradient(conv), (0, None))(stacked(x)[none], w),
        jax.vmap(gradient(conv), (None, 0))(x, stacked(w)[none]),
        jax.vmap(gradient(conv))(stacked(x)[none], stacked(w)[none]),
    ]


@row()
def vmap_of_axis_size(conv, x, w, dy):
    return jax.vmap(lambda: gradient(conv)(x, w), axis_size=3)()


@row()
def vmap_with_axis_name(conv, x, w, dy):
    def example(x):
        return lax.pmean(gradient(conv)(x, w), "batch")

    return jax.vmap(example, axis_name="batch", out_axes=None)(stacked(x))


@row()
def vmap_with_spmd_axis_name(conv, x, w, dy):
    return jax.jit(jax.vmap(gradient(conv), (0, None), spmd_axis_name="data"))(stacked(x), w)


@row(input_grad=False)
def per_example_gradients(conv, x, w, dy):
    return jax.vmap(jax.value_and_grad(loss(conv), 1), (0, None))(stacked(x), w)


@row(depth=4)
def vmap_of_hessian_vector_product(conv, x, w, dy):
    def product(v):
        return jax.jvp(gradient(conv, 0), (x, w), (v, w))[1]

    return jax.vmap(product, in_axes=1, out_axes=2)(stacked(x, 1))


@row(forward_mode=True, input_grad=False)
def vmap_of_jvp(conv, x, w, dy):
    return jax.vmap(lambda v: jax.jvp(lambda x: conv(x, w), (x,), (v,)))(stacked(x))


# --- compilation and tracing


@row(eager=True)
def donation(conv, x, w, dy):
    function = jax.jit(gradient(conv), donate_argnums=(0, 1))
    mine = jnp.copy(x), jnp.copy(w)
    result = function(*mine)
    assert mine[0].is_deleted()
    assert mine[1].is_deleted()
    return result


@row(eager=True)
def lower_and_compile(conv, x, w, dy):
    return jax.jit(gradient(conv)).lower(x, w).compile()(x, w)


@row(eager=True)
def make_jaxpr(conv, x, w, dy):
    jaxpr, shapes = jax.make_jaxpr(gradient(conv), return_shape=True)(x, w)
    result = jax.jit(jax.extend.core.jaxpr_as_fun(jaxpr))(x, w)
    expected = [(s.shape, s.dtype) for s in shapes]
    assert [(r.shape, r.dtype) for r in result] == expected
    return result


@row(eager=True)
def eval_shape(conv, x, w, dy):
    result = gradient(conv)(x, w)
    shapes = jax.eval_shape(gradient(conv), x, w)
    assert [(s.shape, s.dtype) for s in shapes] == [(r.shape, r.dtype) for r in result]
    return result


@row()
def named_scope_and_call(conv, x, w, dy):
    with jax.named_scope("outer"):
        return jax.jit(gradient(jax.named_call(conv, name="inner")))(x, w)


@row(eager=True)
def compile_time_eval(conv, x, w, dy):
    @jax.jit
    def function(scale):
        with jax.ensure_compile_time_eval():
            constants = gradient(conv)(x, w)
        return jax.tree.map(lambda c: c * scale.astype(c.dtype), constants)

    return function(jnp.asarray(2.0))


@row(eager=True)
def disable_jit(conv, x, w, dy):
    with jax.disable_jit():
        return jax.vmap(jax.jit(gradient(conv)), (0, None))(stacked(x), w)


@row(eager=True)
def debug_nans(conv, x, w, dy):
    with jax.debug_nans(True):
        return jax.jit(gradient(conv))(x, w), gradient(conv)(x, w)


@row(eager=True)
def checking_leaks(conv, x, w, dy):
    with jax.checking_leaks():
        return jax.jit(jax.vmap(gradient(conv), (0, None)))(stacked(x), w)


@row()
def strict_promotion(conv, x, w, dy):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        batched = jax.vmap(gradient(conv))(stacked(x), stacked(w))
        return batched, jax.jvp(gradient(conv), (x, w), (x, w))


@row(eager=True)
def enable_x64_inside(conv, x, w, dy):
    with jax.enable_x64(True):
        result = jax.jit(gradient(conv))(x, w)
    assert [r.dtype for r in result] == [x.dtype, w.dtype]
    return result


@row(eager=True)
def no_implicit_transfer(conv, x, w, dy):
    function = jax.jit(gradient(conv))
    function(x, w)
    with jax.transfer_guard("disallow"):
        return function(x, w)


@row()
def default_matmul_precision(conv, x, w, dy):
    with jax.default_matmul_precision("highest"):
        return jax.jit(gradient(conv))(x, w)


@row()
def callback_beside_it(conv, x, w, dy):
    def called(x, w):
        y = conv(x, w)
        doubled = jax.pure_callback(lambda y: 2 * y, y, lax.stop_gradient(y))
        return y + doubled

    return jax.jit(gradient(called))(x, w)


@row(eager=True)
def checked_by_checkify(conv, x, w, dy):
    checked = checkify.checkify(jax.jit(gradient(conv)), errors=checkify.float_checks)
    error, result = checked(x, w)
    error.throw()
    return result


@row()
def optimization_barrier(conv, x, w, dy):
    return gradient(lambda x, w: conv(*lax.optimization_barrier((x, w))))(x, w)


@row(eager=True, depth=3)
def reference_to_an_array(conv, x, w, dy):
    total = jax.new_ref(jnp.zeros_like(w))

    @jax.jit
    def accumulate(x):
        total[...] += gradient(conv, 1)(x, w)

    accumulate(x)
    accumulate(2 * x)
    return total[...], gradient(conv, 0)(x, w)
