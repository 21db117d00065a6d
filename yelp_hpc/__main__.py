"""`python -m yelp_hpc` and `yelp-hpc`: in a Python that can, in which no file shadows a library.

Of the working directory nothing is imported. What PYTHONPATH puts in the way is said. This file and
`__init__` are read by older Pythons, too.
"""

import os  # loaded before the working directory is looked at, as sys is
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - a login node's own python3 is often older
    sys.stderr.write(
        f"yelp_hpc needs Python 3.11 or newer, and {sys.executable} is "
        f"{sys.version_info[0]}.{sys.version_info[1]}: make a virtual environment of a newer one "
        "(often: module load python)\n"
    )
    sys.exit(2)
if not os.path.exists(__file__):  # noqa: PTH110
    sys.stderr.write(
        "yelp_hpc hands its own files on to its jobs, which cannot be taken from a zip archive: "
        "unpack it, or install the package\n"
    )
    sys.exit(2)
try:
    here = ("", os.getcwd())  # noqa: PTH109
except OSError:  # it is no longer there
    here = ("", "")
if not sys.flags.safe_path and sys.path[0] in here:
    del sys.path[0]  # the package is found already, and all of ours lies inside it


def start() -> None:
    """Run the command line; a library that is missing, or another in its place, is one message."""
    try:
        from yelp_hpc.cli.main import main
        from yelp_hpc.runtime import in_plain_python, undo_inherited

        undo_inherited()
        in_plain_python()
        main()
    except KeyboardInterrupt:  # while all of that is imported
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except Exception as error:
        failed = _no_room(error)
        refused = (
            _in_the_way(error)
            or _unfit(error)
            or _misread(error)
            or _too_old(error)
            or _missing(error)
        )
        if not failed and not refused:
            raise
        sys.stderr.write(f"{failed or refused}\n")
        sys.exit(1 if failed else 2)
    finally:
        from yelp_hpc.progress import flush_streams

        flush_streams()


def _in_the_way(error: Exception) -> str:
    """Of a module that PYTHONPATH has put before the one that is needed; "" for any other error."""
    # `yaml.nodes` of a yaml.py that is no package, a name that a module lacks, an attribute of it
    whole = sys.modules.get(str(getattr(error, "name", "")).partition(".")[0])
    files = (getattr(module, "__file__", None) for module in (getattr(error, "obj", None), whole))
    found = str(getattr(error, "path", None) or next(filter(None, files), ""))
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        folder = os.path.abspath(entry)  # noqa: PTH100 - nothing more is imported here
        if folder != ours and found.startswith(os.path.join(folder, "")):  # noqa: PTH118
            return (
                f"{found} stands in the way of the library of its name ({error}): leave {entry} "
                "out of PYTHONPATH, or rename what is in it"
            )
    return ""


def _missing(error: Exception) -> str:
    name = str(getattr(error, "name", "")).partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name in ("", "yelp_hpc"):
        return ""
    from yelp_hpc.own_files import pip_install

    return (
        f"this needs the package {name}, which {sys.executable} does not have:\n"
        f"  {pip_install('yelp-hpc')}\n"
        "or call the Python that it is installed for"
    )


def _no_room(error: Exception) -> str:
    """Of a process that may not have the memory or the threads that it needs."""
    failed = ("map segment", "Cannot allocate memory", "start new thread", "worker thread")
    if not isinstance(error, MemoryError) and not any(said in str(error) for said in failed):
        return ""
    import resource

    limits = {"v": resource.RLIMIT_AS, "u": resource.RLIMIT_NPROC}
    most = {name: resource.getrlimit(limit)[0] for name, limit in limits.items()}
    set_here = [f"ulimit -{n}: {most[n]}" for n in most if most[n] != resource.RLIM_INFINITY]
    known = f" ({', '.join(set_here)})" if set_here else ""
    return f"there is not enough memory, or no thread more, here{known}: {error or 'MemoryError'}"


def _unfit(error: Exception) -> str:
    """Of a shared library that the shell's settings put before the one that is needed."""
    import re

    names = [name for name in ("LD_LIBRARY_PATH", "LD_PRELOAD") if os.environ.get(name)]
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\.so\b", line)]
    kind = isinstance(error, (ImportError, OSError)) and "import name" not in str(error)
    if not (names and lines and kind):
        return ""
    return (
        f"a library does not fit: {lines[0]}\n"
        f"{' and '.join(names)} of your shell may put another in its place (a module, conda): "
        f"unset {' '.join(names)} and try again"
    )


def _misread(error: Exception) -> str:
    """Of a variable of the shell that a library reads and cannot use, by the line that reads it."""
    import linecache
    import re
    import traceback

    if not isinstance(error, ValueError):
        return ""
    # the line that reads it, or that hands it to what reads it
    for frame in reversed(traceback.extract_tb(error.__traceback__)[-2:]):
        first, last = frame.lineno or 0, frame.end_lineno or 0
        lines = "".join(linecache.getlines(frame.filename)[first - 1 : last])
        for name in re.findall(r"(?:environ(?:\.get)?|getenv)[\[(]\s*[\"'](\w+)", lines):
            if name in os.environ:
                return f"{name} of your shell cannot be used ({error}): unset {name}, or mend it"
    return ""


def _too_old(error: Exception) -> str:
    from yelp_hpc.own_files import outdated

    old = outdated(("job", "demo"))
    return old and f"{type(error).__name__}: {error}\n{old}"


if __name__ == "__main__":
    start()
