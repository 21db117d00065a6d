#!/bin/bash
# Regenerate cpu.lock and cuda.lock from pyproject.toml with pip-compile (pip install pip-tools).
# The index is pip's own configuration; neither its name nor any path is written into a lock.
#
#   containers/lock.sh                the sets of a release
#   containers/lock.sh --index URL    cuda.lock alone, with the torch of an index of PyTorch's for an
#                                     older driver (…/whl/cu126); TORCH=VERSION where it has no newer
set -euo pipefail
INDEX=
if [ "${1-}" = --index ]; then INDEX=${2:?an index of PyTorch is missing behind --index}; fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-2.13.0}
pin=$(mktemp); trap 'rm -f "$pin"' EXIT
echo "torch==$TORCH" > "$pin"

compile() {
    "$PYTHON" -m piptools compile -q --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
        --extra job --extra demo --extra dev --extra docs -c "$pin" -o "$1" pyproject.toml
}

if [ -n "$INDEX" ]; then
    PIP_EXTRA_INDEX_URL=$INDEX compile containers/cuda.lock
    sed -i "1i # The GPU set with torch for an older driver. Made by containers/lock.sh --index." containers/cuda.lock
    sed -i 's/^coverage==/coverage[toml]==/' containers/cuda.lock
    exit
fi
# The CPU set needs a source of CPU builds of torch in pip's configuration (find-links or an index).
compile containers/cpu.lock
sed -i 's/^torch==\([0-9.]*\)+cpu/torch==\1/' containers/cpu.lock
sed -i '1i # The CPU set: host, job, demo, dev and docs packages, torch built for the CPU. Made by `make lock`.' containers/cpu.lock
# The CUDA set takes PyPI's builds only.
PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' compile containers/cuda.lock
sed -i "1i # The GPU set: the same packages, PyPI's CUDA build of torch and what it needs. Made by \`make lock\`." containers/cuda.lock
# pytest-cov asks for coverage[toml]; pip takes the hash of that name only if the lock spells it so
sed -i 's/^coverage==/coverage[toml]==/' containers/cpu.lock containers/cuda.lock
