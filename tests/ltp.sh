#!/usr/bin/env bash
# Runs madvise tests of a built LTP (DIR/testcases/kernel/syscalls/madvise), or those that are named, on a fresh mount under
# daxemu run. Exit status 1 if one failed or broke; what LTP skips (TCONF) is said.
set -eu
suite=${1:?usage: make ltp LTP=DIR, a built copy of the Linux Test Project}
shift
syscalls=$(cd "$suite/testcases/kernel/syscalls" && pwd)
[ -x "$syscalls/madvise/madvise07" ] || { echo "daxemu: $suite is not built: build it first" >&2; exit 2; }
daxemu=$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/daxemu
mountpoint=$(mktemp -d)
device=/dev/shm/daxemu-ltp-$$
trap '"$daxemu" umount --force "$mountpoint" >/dev/null 2>&1 || true; rm -rf "$device"; rmdir "$mountpoint"' EXIT
"$daxemu" mkfs "$device" --size 4G
"$daxemu" mount "$device" "$mountpoint"
[ $# -gt 0 ] || set -- madvise01 madvise02 madvise03 madvise05 madvise07 madvise08 madvise10 madvise11 madvise12
failed=0
for test; do
	program=$(find "$syscalls" -name "$test" -type f -perm -u+x -print -quit)
	[ -n "$program" ] || { echo "$test FAILED: it is not built"; failed=1; continue; }
	status=0
	said=$(TMPDIR=$mountpoint PATH=$(dirname "$program"):$PATH "$daxemu" run -- "$program" 2>&1) || status=$?
	grep -E 'T(FAIL|BROK|CONF|WARN)' <<<"$said" || true
	case $status in # see tst_res_flags.h: TCONF is 32
	0) echo "$test ok" ;;
	32) echo "$test skipped" ;;
	*) echo "$test FAILED ($status)" && failed=1 ;;
	esac
done
"$daxemu" umount "$mountpoint"
"$daxemu" fsck "$device" || failed=1
exit $failed
