"""Compile an image's modules, a part of them: `python compile.py SITE_PACKAGES PART OF`.

The same files fall into the same part, and a fresh process compiles each, so that two builds are
equal to the byte. Packages carry files in a newer Python's syntax; those are named and left. Ends
with 1 when anything else cannot be compiled, or a file of this project.
"""

import py_compile
import sys
from pathlib import Path

OWN = "yelp_hpc"


def main(site: Path, part: int, of: int) -> int:
    """Compile every `of`-th file of `site`, from `part` on; returns 1 if one did not compile."""
    problems = 0
    for path in sorted(site.rglob("*.py"))[part::of]:
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH  # the file system is read-only
        try:
            py_compile.compile(str(path), doraise=True, invalidation_mode=mode)
        except py_compile.PyCompileError as error:
            newer = isinstance(error.exc_value, SyntaxError)
            if newer and path.relative_to(site).parts[0] != OWN:
                print(f"left as it is, not this Python's syntax: {path}")
            else:
                problems += 1
                print(f"cannot compile {path}: {error.msg}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
