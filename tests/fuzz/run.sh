#!/usr/bin/env bash
# Fuzzes one parser: bash tests/fuzz/run.sh TARGET SECONDS. Prints the end of what was said, all of it after a failure.
set -eu
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
log=build/fuzz/$1.log
status=0
if [ "$1" = answers ]; then
    DAXEMU_FUZZ_SECONDS=$2 PY=$PY bash tests/asan.sh tests/fuzz/test_answers.py >"$log" 2>&1 || status=$?
else
    "$PY" -m tests.fuzz "$1" "$2" >"$log" 2>&1 || status=$?
fi
if [ "$status" -ne 0 ]; then
    cat "$log"
    echo "daxemu: fuzzing $1 failed: $log; inputs that break it are build/fuzz/crash-$1-*" >&2
    exit 1
fi
echo "$1: $(tail -n 1 "$log")"
