"""Who may read what is written: the umask's business, not a library's."""

from __future__ import annotations

from pathlib import Path


def let_umask_rule(folder: Path) -> None:
    """Give files that a library made for their owner alone the mode of any other new file.

    safetensors writes through a temporary file of mode 0600, so that colleagues of a group could
    not read the weights. The folder was made under the same umask.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600:
            path.chmod(mode)
