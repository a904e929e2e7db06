#!/usr/bin/env bash
# Runs a built fstests (DIR/check, DIR/src) on fresh mounts: xfs/550, 551 and 552 as they are, under daxemu run; or with arguments
# for it, DIR/check itself, less the tests of fstests/exclude. Exit status 0 if nothing failed.
set -eu
suite=${1:?usage: make fstests XFSTESTS=DIR, a built copy of fstests}
shift
[ -x "$suite/src/t_mmap_cow_memory_failure" ] || { echo "daxemu: $suite is not built: build it first" >&2; exit 2; }
suite=$(cd "$suite" && pwd)
our=$(cd "$(dirname "$0")/fstests" && pwd)
daxemu=$(cd "$our/../.." && pwd)/.venv/bin/daxemu
tmp=$(mktemp -d /tmp/daxemu-fstests-XXXXXX) # no dots: mount(8) looks for helpers by them
device=/dev/shm/daxemu-fstests-$$
SCRATCH_MNT=$tmp/scratch
export daxemu device tmp SCRATCH_MNT
end() {
	for mount in "$tmp/test" "$tmp/scratch"; do
		"$daxemu" umount --force "$mount" >/dev/null 2>&1 || true
	done
	rm -rf "$device" "$device-test" /dev/shm/sem.sync "$tmp"
}
trap end EXIT
chmod 755 "$tmp" # for the tests that are other users
mkdir -p "$tmp/scratch" "$tmp/test" "$tmp/common" "$tmp/bin"
failed=0

memory_failure() {
	cp "$our/preamble" "$tmp/common"
	touch "$tmp/common/filter" "$tmp/common/reflink"
	ln -s "$suite/src" "$tmp/src"
	for test in xfs/550 xfs/551 xfs/552; do
		(cd "$tmp" && "$daxemu" run --simulated -- bash "$suite/tests/$test") >"$tmp/out" || failed=1
		if diff -u "$suite/tests/$test.out" "$tmp/out"; then echo "$test ok"; else failed=1 && echo "$test FAILED"; fi
		"$daxemu" umount "$SCRATCH_MNT" >/dev/null
		"$daxemu" fsck "$device" >/dev/null || failed=1
	done
}
# FSTYP=fuse. fstests wants df to say "fuse" and a helper to mount with; mount.fuse(8) of the fuse3 package calls ours.
check() {
	cat >"$tmp/bin/mount-daxemu" <<-END
		#!/bin/sh
		# SOURCE DIR -o OPTIONS: those that daxemu mount lacks (ro), or does not give (dev, suid), are the VFS's own
		case \$4 in
		*remount*) ;;
		*) "$daxemu" mount "\${1#daxemu:}" "\$2" >/dev/null || exit ;;
		esac
		exec mount -i -o "remount,dev,suid,\$4" "\$2"
	END
	printf '#!/bin/bash\nset -o pipefail\n%s "$@" | sed "s/ fuse.daxemu/ fuse/"\n' "$(type -P df)" >"$tmp/bin/df"
	chmod +x "$tmp/bin/"*
	"$daxemu" mkfs "$device" --size 8G --force >/dev/null
	"$daxemu" mkfs "$device-test" --size 8G >/dev/null
	cat >"$tmp/config" <<-END
		export FSTYP=fuse FUSE_SUBTYP=.$tmp/bin/mount-daxemu
		export TEST_DEV=daxemu:$device-test TEST_DIR=$tmp/test
		export SCRATCH_DEV=daxemu:$device SCRATCH_MNT=$tmp/scratch
	END
	sed 's/[[:space:]]*#.*//; /^$/d' "$our/exclude" >"$tmp/exclude"
	(cd "$suite" && PATH=$tmp/bin:$PATH HOST_OPTIONS=$tmp/config ./check -fuse -E "$tmp/exclude" "$@") || failed=1
	"$daxemu" umount "$tmp/scratch" >/dev/null 2>&1 || true # check leaves it mounted, or not
	"$daxemu" umount "$tmp/test" >/dev/null 2>&1 || true
	"$daxemu" fsck "$device" && "$daxemu" fsck "$device-test" || failed=1
}

if [ $# = 0 ]; then memory_failure; else check "$@"; fi
exit $failed
