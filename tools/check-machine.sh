#!/bin/sh
# Says, in one message, what this machine lacks for `make demo` and `make test`, and the line that brings it.
python=${1:-python3}
lacks=
if ! command -v "$python" >/dev/null 2>&1; then
    lacks="$lacks python3 python3-venv python3-dev"
else
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "commfuse needs Python 3.10 or later; $python is $("$python" --version). Name another one: make PYTHON=python3.12 ..." >&2
        exit 1
    }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || lacks="$lacks python3-venv"
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
        || lacks="$lacks python3-dev"
fi
command -v g++ >/dev/null 2>&1 || lacks="$lacks g++"
if [ -n "$lacks" ]; then
    echo "This machine lacks:$lacks" >&2
    echo "On Debian or Ubuntu:  apt-get install -y$lacks" >&2
    exit 1
fi
