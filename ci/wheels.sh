#!/usr/bin/env bash
# Wheels of this tree in dist/, one for each Python, with the platform tag that their symbols allow.
#
#   ci/wheels.sh python3.11 python3.12
#
# With the oldest glibc that torch supports, for publishing; CUDA's kernels too, if asked for:
#   docker run --rm -v "$PWD:/src" -w /src quay.io/pypa/manylinux_2_28_x86_64 \
#       bash -c 'ci/wheels.sh /opt/python/cp31{0,1,2,3}-cp31?/bin/python'
#
# pip fetches the build tools; auditwheel and patchelf are on PATH, as they are in that image. No
# OpenMP runtime may come along: torch has one, and a process needs one set of threads.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,5s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p dist
staged=$(mktemp -d)
trap 'rm -rf "$staged"' EXIT
for python in "$@"; do
    "$python" -m pip wheel --no-deps --wheel-dir "$staged" .
    for wheel in "$staged"/*.whl; do
        case $wheel in
            *-none-any.whl) cp "$wheel" dist/ ;;  # PEFTKERN_NATIVE=0
            *) auditwheel repair --exclude libgomp.so.1 --wheel-dir dist "$wheel" ;;
        esac
        rm "$wheel"
    done
done
ls -l dist/*.whl
