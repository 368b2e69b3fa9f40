"""`python -m jax_convgrad`: see `tools.command_line`."""

import sys

from .tools.command_line import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
