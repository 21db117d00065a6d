"""What an image holds, as a CycloneDX file beside it: IMAGE.cdx.json, for scanners.

Asks the image for its Python packages and its Debian packages; the SHA-256 of each wheel comes from
the folder that it was installed from. Equal images give equal files.
"""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from yelp_hpc.errors import StageError
from yelp_hpc.image.check import ISOLATED, normal_name
from yelp_hpc.image.file import image_sha256
from yelp_hpc.own_files import version
from yelp_hpc.rundir.files import parse_json, sha256_file, write_json
from yelp_hpc.runtime import program

_ASK = """
import importlib.metadata as m, json, shutil, subprocess
form = "-f=${Package} ${Version} ${Architecture}\\n"
asked = ["dpkg-query", "-W", form]
debian = ""
if shutil.which(asked[0]):
    debian = subprocess.run(asked, capture_output=True, text=True).stdout
print(json.dumps({"python": [[d.metadata["Name"], d.version] for d in m.distributions()],
                  "debian": [line.split() for line in debian.splitlines()]}))
"""


def sbom_path(image: Path) -> Path:
    """Where the file of `image` lies."""
    return image.with_name(f"{image.name}.cdx.json")


def write_sbom(image: Path, wheels: Path) -> Path:
    """Write the file for a finished image; `wheels`: the folder that it was installed from.

    Raises:
        StageError: the image cannot be asked, or the file cannot be written.
    """
    argv = [program("apptainer"), "--silent", "exec", *ISOLATED, str(image), "python", "-c", _ASK]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    try:
        inside = parse_json(done.stdout)
    except ValueError:
        why = done.stderr.strip()[-300:]
        raise StageError(f"{image} does not say what it holds: {why}") from None
    hashes = {_key(path): sha256_file(path) for path in wheels.glob("*.whl")}
    content = sbom(image.name, image_sha256(image), inside["python"], inside["debian"], hashes)
    write_json(sbom_path(image), content)
    return sbom_path(image)


def sbom(
    name: str,
    sha256: str,
    python: Iterable[tuple[str, str]],
    debian: Iterable[tuple[str, str, str]],
    wheels: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    """The document, CycloneDX 1.6.

    Args:
        python: name and version of each Python package.
        debian: name, version and architecture of each Debian package.
        wheels: normalised name and version → SHA-256 of the wheel.
    """
    components = [_python(package, number, wheels) for package, number in sorted(python)]
    components += [
        {
            "type": "library",
            "name": package,
            "version": number,
            "purl": f"pkg:deb/debian/{quote(package)}@{quote(number, safe='')}?arch={arch}",
        }
        for package, number, arch in sorted(debian)
    ]
    for component in components:
        component["bom-ref"] = component["purl"]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, sha256)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": name,
                "name": name,
                "version": version(),
                "hashes": [{"alg": "SHA-256", "content": sha256}],
            },
            "tools": {
                "components": [{"type": "application", "name": "yelp-hpc", "version": version()}]
            },
        },
        "components": components,
    }


def _python(name: str, number: str, wheels: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    key = (normal_name(name), number)
    purl = f"pkg:pypi/{key[0]}@{quote(number, safe='')}"
    component = {"type": "library", "name": name, "version": number, "purl": purl}
    digest = wheels.get(key) or wheels.get((key[0], number.partition("+")[0]))
    return component | ({"hashes": [{"alg": "SHA-256", "content": digest}]} if digest else {})


def _key(wheel: Path) -> tuple[str, str]:
    name, number, *_ = wheel.name.split("-")
    return normal_name(name), number
