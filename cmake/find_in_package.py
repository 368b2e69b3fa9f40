"""Prints where a folder of an installed package lies, without importing it."""

import importlib.util
import pathlib
import sys

package, folder = sys.argv[1:]
spec = importlib.util.find_spec(package)
for root in spec.submodule_search_locations or () if spec else ():
    path = pathlib.Path(root, folder)
    if path.exists():
        print(path.as_posix())
        break
