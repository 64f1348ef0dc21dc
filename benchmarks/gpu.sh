#!/bin/sh
# The GPU check on a bare machine: a checkout and the installed packages are all it needs. gpu.sh [OUT.json]
set -eu
cd "$(dirname "$0")"
PYTHONPATH="..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" gpu.py --out "${1:-gpu.json}"
