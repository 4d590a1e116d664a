#!/usr/bin/env bash
# All measurements on one GPU: bash benchmarks/gpu.sh OUTPUT [options of gpu.py]
# Wheels that the machine lacks are taken from .whl/ in the repository's root, where there is such a folder.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
output=${1:?give a folder for the results}
shift
python=${PYTHON:-python3}
paths=$root
if compgen -G "$root/.whl/*.whl" > /dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/.whl/*.whl
    paths=$site:$root
fi
PYTHONUNBUFFERED=1 PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/benchmarks/gpu.py" --output "$output" "$@"
