"""`python -m yelp_hpc`, in which no file of the working directory shadows ours or a library's."""

import os  # loaded before the working directory is looked at, as sys is
import sys

try:
    here = ("", os.getcwd())  # noqa: PTH109
except OSError:  # it is no longer there
    here = ("", "")
if not sys.flags.safe_path and sys.path[0] in here:
    del sys.path[0]  # the package is found already, and all of ours lies inside it

from yelp_hpc.cli.main import main

if __name__ == "__main__":
    main()
