#!/usr/bin/env bash
# Runs tests with the C parts built for AddressSanitizer and UBSan: bash tests/asan.sh PYTEST-ARGUMENTS...
# Fails if a test fails, or if any process, a supervisor included, reported an error to build/asan/log.PID.
set -eu
cd "$(dirname "$0")/.."
PY=$(realpath -s "${PY:-.venv/bin/python}")
top=$PWD/build/asan
unset PYTHONPATH

# A build tree: the installed copy in src/ stays as it is.
rm -rf "$top"
mkdir -p "$top"
sanitize="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS="$sanitize -g -O1" LDFLAGS="$sanitize" \
    "$PY" -W ignore setup.py -q build --build-temp "$top/temp" --build-lib "$top/lib"
for part in fuse/_supplement victims/_victims run/_forward direct/_agent; do
    nm -D "$top"/lib/daxemu/host/$part.*.so | grep -q __asan_init || {
        echo "daxemu: $part was not built with AddressSanitizer: see what setup.py said above" >&2
        exit 1
    }
done

# Python itself has no sanitizer, so the runtimes are preloaded, into Python alone: ASan finds errors of other programs as
# well (aligned_alloc in dd). A PYTHONPATH that a test sets comes first. Tests expect SIGBUS and SIGSEGV as the kernel sends them. Leaks are not reported: Python
# keeps memory until its end.
runtime="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
options="log_path=$top/log:exitcode=99:detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_abort=0:handle_sigill=0"
printf '%s\n' "#!/bin/sh" \
    "export ASAN_OPTIONS='$options:handle_sigfpe=0' UBSAN_OPTIONS='log_path=$top/log:print_stacktrace=1'" \
    "export PYTHONPATH=\"\${PYTHONPATH:+\$PYTHONPATH:}$top/lib\" PYTHONMALLOC=malloc LD_PRELOAD='$runtime'" \
    "exec '$PY' \"\$@\"" >"$top/python"
chmod +x "$top/python"
# Interpreters that are started by their own path, as by the script daxemu or by another user, start anew.
printf '%s\n' "import os, sys" \
    "is_ours = sys.prefix == '$(dirname "$(dirname "$PY")")'" \
    "if os.environ.pop('LD_PRELOAD', None) is not None:" \
    "    sys.executable = '$top/python' if is_ours else sys.executable" \
    "elif is_ours:" \
    "    os.execv('$top/python', ['$top/python', *sys.orig_argv[1:]])" \
    "else:" \
    "    os.environ['LD_PRELOAD'] = '$runtime'" \
    "    os.execv(sys.executable, sys.orig_argv)" >"$top/lib/sitecustomize.py"

status=0
"$top/python" -m pytest "$@" || status=$?

shopt -s nullglob
logs=("$top"/log.*)
if [ ${#logs[@]} -gt 0 ]; then
    cat "${logs[@]}" >&2
    echo "daxemu: ${#logs[@]} processes reported memory errors, above" >&2
    status=1
fi
exit "$status"
