#!/bin/sh
# Make a virtual environment with all dependencies, or print what is missing. No compiler is needed.
# usage: [PYTHON=python3.12] [PIP_ARGS=...] make_venv.sh FOLDER
set -u
folder=$1
is_new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$python" -c "$is_new_enough" 2>/dev/null; then found=$python; break; fi
done
if [ -z "${found:-}" ]; then
    echo "No Python of version 3.11 or newer found (tried: ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11})." >&2
    echo "Install one, or set its path: make ... PYTHON=/path/to/python3.12" >&2
    exit 1
fi
if ! "$found" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "$found cannot make virtual environments: its venv module is missing." >&2
    echo "On Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
fi
"$folder/bin/python" -c "$is_new_enough" 2>/dev/null || "$found" -m venv --clear "$folder" || exit 1
echo "Installing into $folder ($("$folder/bin/python" --version)): several gigabytes the first time, mostly torch."
if ! "$folder/bin/python" -m pip install -q ${PIP_ARGS:-} -c constraints.txt -e '.[notebooks,cluster,geo,onnx,dev]'; then
    echo "pip could not install the packages: see its message above; the usual causes are no network or a full disk." >&2
    exit 1
fi
