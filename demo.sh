#!/bin/sh
# What dirtmap does, on images that QEMU makes and writes to: `make demo`. Everything lives in a folder that goes away
# at the end; a step that does not turn out as told ends the demo with an error.
set -eu

folder=$(mktemp -d)
daemon=
cleanup() {
    [ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true
    rm -rf "$folder"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
cd "$folder"

say() { printf '\n%s\n' "$*"; }
show() { echo "\$ $*"; "$@"; }
refused() {
    echo "\$ $*"
    if "$@" >refusal 2>&1; then
        echo "demo: that should have been refused" >&2
        exit 1
    fi
    cat refusal
}
# What QEMU serves as the content of a bitmap; nbdinfo starts the server and ends it.
qemus_map() { nbdinfo --map="qemu:dirty-bitmap:$1" --json -- [ qemu-nbd --read-only -f qcow2 --bitmap="$1" disk.qcow2 ]; }

say "qemu-img makes a disk of 1 GiB with a bitmap, and QEMU records writes in it."
show qemu-img create -q -f qcow2 disk.qcow2 1G
show qemu-img bitmap --add disk.qcow2 monday
show qemu-io -f qcow2 -c 'write -q 0 1M' -c 'write -q 300M 40M' -c 'write -q 700M 5k' disk.qcow2

say "dirtmap sees what QEMU recorded: a list, the structures on disk, the map."
show dirtmap list disk.qcow2
echo "\$ dirtmap dump disk.qcow2      (its last part)"
dirtmap dump disk.qcow2 >dump
sed -n '/^directory entry/,$p' dump
show dirtmap map disk.qcow2 monday
show dirtmap map --picture disk.qcow2 monday

say "The map is the one that QEMU itself serves, to the byte:"
dirtmap map --output=json disk.qcow2 monday >ours.json
qemus_map monday >qemus.json
show diff ours.json qemus.json
echo "(no difference)"

say "A bitmap for Tuesday, coarser, made by dirtmap; QEMU records in it."
show dirtmap disable disk.qcow2 monday
show dirtmap add -g 1M disk.qcow2 tuesday
show qemu-io -f qcow2 -c 'write -q 512M 2M' disk.qcow2

say "Both together, under another name."
show dirtmap add --disabled disk.qcow2 both
show dirtmap merge disk.qcow2 both monday tuesday
show dirtmap rename disk.qcow2 both week
show dirtmap list disk.qcow2
dirtmap map --output=json disk.qcow2 week >ours.json
qemus_map week >qemus.json
show diff ours.json qemus.json
echo "(no difference)"
show qemu-img check disk.qcow2

say "A qemu-storage-daemon opens the disk, as a virtual machine would, and tracks a write."
show dirtmap enable disk.qcow2 monday
qemu-storage-daemon --pidfile pid \
    --blockdev driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2 \
    --nbd-server addr.type=unix,addr.path=nbd.sock --export type=nbd,id=disk,node-name=disk,writable=on &
daemon=$!
tries=100
until [ -s pid ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || { echo "demo: qemu-storage-daemon did not start" >&2; exit 1; }
    sleep 0.1
done
show qemu-io -f raw -c 'write -q 900M 1M' 'nbd+unix:///disk?socket=nbd.sock'
echo "Meanwhile the disk is its own; dirtmap keeps away:"
refused dirtmap remove disk.qcow2 week

say "It is killed, without a chance to save its bitmaps."
echo "\$ kill -KILL $daemon"
kill -KILL "$daemon"
wait "$daemon" 2>/dev/null || true
daemon=
show dirtmap list disk.qcow2
echo "QEMU refuses them now, and offers nothing but to remove them:"
refused qemu-img bitmap --enable disk.qcow2 monday

say "What they missed cannot be known, so recover makes them all dirty: the next backup copies too much, never too little."
show dirtmap recover disk.qcow2
show dirtmap list disk.qcow2
echo "QEMU accepts them again, goes on recording, and finds no fault:"
show qemu-img bitmap --clear disk.qcow2 monday
show qemu-io -f qcow2 -c 'write -q 4M 64k' disk.qcow2
show dirtmap map --dirty disk.qcow2 monday
dirtmap map --output=json disk.qcow2 monday >ours.json
qemus_map monday >qemus.json
show diff ours.json qemus.json
echo "(no difference)"
show qemu-img check disk.qcow2

say "A raw disk has no place for bitmaps: a store keeps them, under a name. Names hold for the whole host."
DIRTMAP_STORE=$folder/default.dmap DIRTMAP_INDEX=$folder/index DIRTMAP_LIVE=$folder/live
export DIRTMAP_STORE DIRTMAP_INDEX DIRTMAP_LIVE
mkdir live
show truncate -s 1G data.raw
show dirtmap node add data data.raw
show dirtmap add data monday
show dirtmap node add system disk.qcow2
show dirtmap index scan .
show dirtmap find monday

say "A program that writes the raw disk itself marks each write before it makes it, and is killed."
cat >writer.py <<'EOF'
import os, signal
import dirtmap.engine as dm

with dm.open("data") as image, image.track() as tracker, open("data.raw", "r+b") as disk:
    for offset in (0, 300 << 20, 777 << 20):
        with tracker.write(offset, 5000):
            os.pwrite(disk.fileno(), b"x" * 5000, offset)
    os.kill(os.getpid(), signal.SIGKILL)
EOF
show cat writer.py
echo "\$ python writer.py"
python writer.py 2>/dev/null && { echo "demo: the program should have been killed" >&2; exit 1; }
show dirtmap track status data

say "Every mark that had returned is there, no more and no less; a change, or recover, writes them into the store."
show dirtmap recover data
show dirtmap map --dirty data monday
dirtmap map --dirty data monday >map
[ "$(wc -l <map)" = 3 ] || { echo "demo: there should be three extents" >&2; exit 1; }
show dirtmap check default.dmap

say "A backup of both disks. From now on each begins with a bitmap of its own."
show dirtmap backup create data system backups

say "A machine writes to the raw disk, by way of dirtmap serve, which marks it; QEMU writes to the other one."
show dirtmap serve data --run 'qemu-io -f raw -c "write -q -P 7 500M 64k" "$uri"'
show qemu-io -f qcow2 -c 'write -q -P 9 100M 1M' disk.qcow2

say "The next backup copies that, and no more; the folder holds qcow2 images that QEMU reads."
show dirtmap backup create data system backups
show dirtmap backup list backups
dirtmap backup list --output=json backups >list.json
[ "$(grep -c '"kind": "incremental"' list.json)" = 2 ] || { echo "demo: there should be two increments" >&2; exit 1; }

say "Any of them can be had back, whole, and is what the disk was."
show dirtmap backup restore backups data restored.raw
show cmp data.raw restored.raw
show dirtmap backup restore backups system restored.qcow2
show qemu-img compare disk.qcow2 restored.qcow2
show dirtmap backup verify backups

say "Done."
