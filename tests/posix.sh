#!/usr/bin/env bash
# Runs a built pjdfstest (DIR/pjdfstest and DIR/tests) on a fresh mount; exit status as prove's.
set -eu
suite=${1:?usage: make posix PJDFSTEST=DIR, a built copy of pjdfstest}
[ -x "$suite/pjdfstest" ] || { echo "daxemu: $suite/pjdfstest is not there: build it first" >&2; exit 2; }
suite=$(cd "$suite" && pwd)
daxemu="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/daxemu"
scratch=$(mktemp -d)
device=/dev/shm/daxemu-posix-$$
trap '"$daxemu" umount --force "$scratch" >/dev/null 2>&1 || true; rm -rf "$device"; rmdir "$scratch"' EXIT
"$daxemu" mkfs "$device" --size 4G
"$daxemu" mount "$device" "$scratch"
mkdir "$scratch/t"
cd "$scratch/t"
status=0
prove -r "$suite/tests" || status=$?
cd /
"$daxemu" umount "$scratch"
"$daxemu" fsck "$device"
exit $status
