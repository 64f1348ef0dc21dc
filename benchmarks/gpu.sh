#!/bin/sh
# Run the GPU check on a bare machine; it needs only a checkout and the installed packages. usage: gpu.sh [OUT.json]
set -eu
cd "$(dirname "$0")"
PYTHONPATH="..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" gpu.py --out "${1:-gpu.json}"
