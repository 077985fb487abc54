#!/bin/sh
# Says, in one message, what this machine lacks for `make test-aarch64`, and the line that brings it.
lacks=
command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || lacks="$lacks g++-aarch64-linux-gnu"
command -v qemu-aarch64 >/dev/null 2>&1 || lacks="$lacks qemu-user"
if [ -n "$lacks" ]; then
    echo "The tests for aarch64 lack:$lacks" >&2
    echo "On Debian or Ubuntu:  apt-get install -y$lacks" >&2
    exit 1
fi
