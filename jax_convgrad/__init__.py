"""A JAX convolution that is computed and differentiated by its own kernels.

`conv_general_dilated` and `conv_transpose` have the signatures of `jax.lax`'s;
`conv_input_grad` and `conv_filter_grad` are the gradients by themselves; `install` gives
the kernels to lax's own convolution.
"""

import pkgutil

# Beside a checkout, `python -m` and pytest import this folder, which holds no compiled
# modules; those of the installed package belong to the same one.
__path__ = pkgutil.extend_path(__path__, __name__)

from .conv import conv_general_dilated, conv_transpose
from .custom_call import export_checks
from .explanation import Explanation, explain
from .geometry import ConvGeometry
from .gradients import conv_filter_grad, conv_input_grad
from .integration import install, installed, uninstall
from .native import __version__

__all__ = [
    "ConvGeometry",
    "Explanation",
    "__version__",
    "conv_filter_grad",
    "conv_general_dilated",
    "conv_input_grad",
    "conv_transpose",
    "explain",
    "export_checks",
    "install",
    "installed",
    "uninstall",
]
