#!/usr/bin/env bash
# Install a wheel or an sdist in a clean environment, and run the command from another folder.
#
#   tools/try_archive.sh dist/pyro_vae-0.1.0-py3-none-any.whl python3
#
set -euo pipefail

archive=$(realpath "$1")
python=$(realpath --no-symlinks "$2")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$python" -m venv environment
environment/bin/python -m pip install --quiet --constraint "$constraints" \
    "pyro-vae[plots] @ file://$archive"
environment/bin/pyro-vae demo --quick --output output > printed.txt 2>&1 ||
    { cat printed.txt; exit 1; }
for file in report.html posterior.nc; do
    [ -s "output/$file" ] || { echo "$archive: the demo wrote no $file" >&2; exit 1; }
done
environment/bin/python -c 'import pyro_vae; print("runs from", pyro_vae.__file__)'
