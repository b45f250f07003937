#!/bin/sh
# Runs a program as a container engine runs it with --read-only --network none --cap-drop all --user 10001:10001:
#   unshare --mount --net --ipc --uts --pid --fork --kill-child sh seal.sh ROOT MODEL PROGRAM [ARGUMENT...]
# with the environment as it is. MODEL is a folder for /model, or "". Runs as root in namespaces of its own.
set -eu
root=$1
model=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t tmpfs -o size=64m,mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs -o size=64m,uid=10001,gid=10001,mode=0755,nosuid,nodev tmpfs "$root/cache"
mount -t tmpfs -o size=1m,mode=0755 tmpfs "$root/dev"
for device in null zero random urandom; do
  : >"$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o size=64m,mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
if [ -n "$model" ]; then
  mount --bind "$model" "$root/model"
  mount -o remount,bind,ro,nosuid,nodev "$root/model"
fi
mount -t proc proc "$root/proc"
mount -o remount,ro "$root/dev"
mount -o remount,bind,ro,nosuid,nodev "$root"
ip link set lo up
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+sys_chroot,+setuid,+setgid \
  "$(command -v chroot)" --userspec=10001:10001 --groups= "$root" "$@"
