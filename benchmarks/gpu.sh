#!/bin/sh
# Benchmarks a GPU in less than 8 minutes and prints one table:
#
#     bash benchmarks/gpu.sh [WHEELS [FILMS [PART ...]]]
#
# WHEELS: a folder of wheels for the packages in requirements.txt that the machine lacks ("" for none). FILMS: a folder
# in MM-IMDb's layout, used many times over; without it (""), synthetic films. PART: steps, loop (both by default), cells
# (another 8 minutes: a whole cell of MM-IMDb's size, and two at once). SMALL=1 tries out the script, on a CPU too.
set -e
wheels=${1:+$(realpath "$1")} films=${2:+$(realpath "$2")} site=$(mktemp -d)
cd "$(dirname "$0")/.."
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1
[ $# -gt 2 ] && shift 2 || shift $#
python3 -m benchmarks.gpu ${films:+--films "$films"} ${1:+--parts "$@"} ${SMALL:+--small}
