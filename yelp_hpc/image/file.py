"""The image as a file: its SHA-256, and a form in which equal contents are equal files.

Host side; reads and changes .sif files, writes `.NAME.sha256.json` beside them, which remembers the
SHA-256.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

from yelp_hpc.errors import StageError
from yelp_hpc.rundir.files import parse_json, sha256_file, write_json
from yelp_hpc.runtime import program

EPOCH = 315532800
"""1980-01-01, the time of everything in an image (seconds since 1970)."""


def no_apptainer() -> str:
    """What is said wherever the container program is missed: on the host, a node, by the doctor."""
    name = program("apptainer")
    return (
        f"{name} is not on PATH (module load apptainer; in jobs, as a line of `setup:`; one of "
        "another name: `programs: {apptainer: NAME}` of the cluster file)"
    )


def variables() -> str:
    """How the names of variables begin that the container program reads."""
    return "SINGULARITY" if "singularity" in Path(program("apptainer")).name else "APPTAINER"


_HEADER, _DESCRIPTOR = 128, 585  # bytes, of the SIF format's global header and of a descriptor
_MAGIC = slice(32, 41)


def why_no_image(image: Path) -> str | None:
    """Why nothing runs in `image`; None: it is a file that begins as a SIF does.

    A .sif that ends before the place of the magic is no document in an image's place: apptainer
    tells.
    """
    try:
        if image.exists() and not image.is_file():
            return f"{image} is no SIF image: it is no file"
        with image.open("rb") as file:
            header = file.read(_HEADER)
        stub = image.suffix == ".sif" and len(header) < _MAGIC.stop
        return None if stub or _is_sif(header) else f"{image} is no SIF image"
    except FileNotFoundError:
        return f"{image} does not exist"
    except OSError as error:
        return f"{image} cannot be read: {error.strerror}"


def _is_sif(header: bytes | bytearray) -> bool:
    return len(header) == _HEADER and header[_MAGIC] == b"SIF_MAGIC"


def image_sha256(image: Path) -> str:
    """SHA-256 of an image; a file of unchanged size and time is not read again.

    Raises:
        StageError: the image cannot be read.
    """
    memo = image.with_name(f".{image.name}.sha256.json")
    try:
        stat = image.stat()
        key = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        with suppress(OSError, ValueError, AttributeError):
            known = parse_json(memo.read_bytes())
            if {name: known.get(name) for name in key} == key and len(known["sha256"]) == 64:
                return str(known["sha256"])
        digest = sha256_file(image)
    except OSError as error:
        raise StageError(f"cannot read the image {image}: {error.strerror}") from None
    with suppress(StageError):  # a folder that is read-only for this user: hashed each time
        write_json(memo, {**key, "sha256": digest})
    return digest


def normalise(image: Path) -> None:
    """Zero the SIF's UUID and set its times, so that two builds of the same content are equal.

    Offsets follow the SIF format's global header and descriptors (sylabs/sif, pkg/sif/sif.go).

    Raises:
        StageError: the file is no SIF.
    """
    with image.open("r+b") as file:
        header = bytearray(file.read(_HEADER))
        if not _is_sif(header):
            raise StageError(f"{image} is no SIF image")
        (total,) = struct.unpack_from("<q", header, 88)
        (offset,) = struct.unpack_from("<q", header, 96)
        header[48:64] = bytes(16)
        header[64:80] = struct.pack("<qq", EPOCH, EPOCH)
        file.seek(0)
        file.write(header)
        for index in range(total):
            file.seek(offset + _DESCRIPTOR * index)
            descriptor = bytearray(file.read(_DESCRIPTOR))
            if descriptor[4]:  # in use
                descriptor[41:57] = struct.pack("<qq", EPOCH, EPOCH)
                file.seek(offset + _DESCRIPTOR * index)
                file.write(descriptor)
