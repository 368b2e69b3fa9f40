"""The least that must work on every supported Python and JAX: import, jit(grad), the kernel.

Run as a script; exits non-zero on failure.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_convgrad
from jax_convgrad import native


def main() -> None:
    assert native.cpu is not None, "the CPU module is missing"
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 8, 9, 9)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((8, 1, 3, 3)), jnp.float32)

    def loss(conv, x, w, **options):
        return (conv(x, w, (2, 1), "SAME", feature_group_count=8, **options) ** 2).sum()

    def gradient(conv, **options):
        return jax.jit(jax.grad(lambda x, w: loss(conv, x, w, **options), argnums=(0, 1)))

    ours = gradient(jax_convgrad.conv_general_dilated, implementation="native")
    theirs = gradient(jax.lax.conv_general_dilated)
    program = ours.lower(x, w).compile().as_text()
    assert native.TARGET in program
    assert native.FORWARD_TARGET in program
    for got, expected in zip(ours(x, w), theirs(x, w), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    with jax_convgrad.installed():
        for got, expected in zip(theirs(x, w), ours(x, w), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
    for switch, calls in ((jax_convgrad.install, True), (jax_convgrad.uninstall, False)):
        switch()
        program = theirs.lower(x, w).compile().as_text()
        assert all((t in program) == calls for t in (native.TARGET, native.FORWARD_TARGET))
    mapped = jax.vmap(jax.grad(lambda x: loss(jax_convgrad.conv_general_dilated, x, w)))
    assert mapped(jnp.stack([x, x])).shape == (2, *x.shape)
    print(f"smoke: Python {sys.version.split()[0]}, jax {jax.__version__}: ok")


if __name__ == "__main__":
    main()
