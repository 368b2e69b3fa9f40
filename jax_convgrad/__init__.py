"""A JAX convolution whose input gradient is computed by its own kernels.

`conv_general_dilated` and `conv_transpose` have the signatures of `jax.lax`'s;
`conv_input_grad` is the gradient by itself; `install` gives it to lax's own convolution.
"""

import pkgutil

# Beside a checkout, `python -m` and pytest import this folder, which holds no compiled
# modules; those of the installed package belong to the same one.
__path__ = pkgutil.extend_path(__path__, __name__)

from .conv import conv_general_dilated, conv_transpose
from .explanation import Explanation, explain
from .exporting import export_checks
from .geometry import ConvGeometry
from .input_grad import conv_input_grad
from .integration import install, installed, uninstall
from .native import __version__

__all__ = [
    "ConvGeometry",
    "Explanation",
    "__version__",
    "conv_general_dilated",
    "conv_input_grad",
    "conv_transpose",
    "explain",
    "export_checks",
    "install",
    "installed",
    "uninstall",
]
