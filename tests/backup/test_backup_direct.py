"""qcow2 disks that are read without QEMU, judged by QEMU."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from support.backups import back_up, qcow2_disk, same
from support.cli import error_of
from support.large import run_measured
from support.qemu import StorageDaemon, ToolError, create, patch, qemu_img, qemu_io, run

import dirtmap.engine as dm
from dirtmap.tools.backup import Repository, creating, files, verify_disk
from dirtmap.tools.backup.direct import DATA, MISSING, DirectImage
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.qsd import nodes

MIB = 1 << 20
MEBIBYTES = 256
Below = tuple[Path, str] | None


def random_image(chooser: random.Random, path: Path, below: Below) -> tuple[Path, str]:
    """An image of any size and clusters, with whatever QEMU writes to one, on another; or a raw one."""
    size = chooser.randrange(1, 6 * MIB // 512) * 512
    if below is None and chooser.random() < 0.3:
        path.write_bytes(chooser.randbytes(size + chooser.choice([0, 7])))
        return path, "raw"
    cluster = chooser.choice([512, 1024, 4096, 65536, 65536, MIB, 2 * MIB])
    allocated = below is None and chooser.choice(["metadata", "falloc", "full", None])
    options = [f"cluster_size={cluster}", chooser.choice(["compat=1.1", "compat=0.10", "lazy_refcounts=on"])]
    options += [f"preallocation={allocated}"] if allocated else []
    create(path, size, ",".join(options), *(() if below is None else ("-b", below[0].name, "-F", below[1])))
    places = chooser.sample(range(size // cluster), 0 if allocated else min(3, size // cluster))
    commands = [f"write -qcP {chooser.randrange(256)} {place * cluster} {cluster}" for place in places]
    for _ in range(chooser.randrange(20)):
        at = chooser.randrange(size // 512) * 512
        length = min(size - at, chooser.choice([512, 4096, 70144, MIB]))
        kinds = [f"write -qP {chooser.randrange(256)}", "write -qz", "write -qz -u", "discard -q"]
        commands.append(f"{chooser.choice(kinds)} {at} {length}")
    for part in (commands[:10], commands[10:]):
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *(word for each in part for word in ("-c", each)), str(path))
        qemu_img("snapshot", "-c", f"snapshot-{len(part)}", path)
    return path, "qcow2"


def content(image: DirectImage, chooser: random.Random) -> bytes:
    """All of a disk, in parts of any length, some of which come where earlier ones were."""
    parts, at = [], 0
    while at < image.size:
        length = min(image.size - at, chooser.choice([MIB, chooser.randrange(1, MIB)]))
        answer = image.wait(image.read(at, length))
        assert not (answer.empty and any(answer.data))
        parts.append(bytes(answer.data))
        image.recycle(answer.data)
        at += length
    return b"".join(parts)


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 200))])
def test_a_disk_reads_as_qemu_reads_it(tmp_path: Path, seed: int) -> None:
    """With what it is on and by itself; and what is said to be zeros is."""
    chooser = random.Random(seed)
    below: Below = None
    for number in range(chooser.randrange(1, 4)):
        below = random_image(chooser, tmp_path / f"{number}.qcow2", below)
    assert below is not None
    path, form = below
    if form == "raw":
        path, _ = random_image(chooser, tmp_path / "last.qcow2", below)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "expected")
    expected = (tmp_path / "expected").read_bytes()
    with dm.Host() as host, DirectImage(str(path), host) as image:
        assert content(image, chooser) == expected
        at = 0
        while at < image.size:
            for length, flags in image.status(at, image.size - at):
                assert length > 0
                assert not (flags and any(expected[at : at + length]))
                at += length
        assert at == image.size == len(expected)
    with DirectImage(str(path)) as image, Images() as opened:
        opened.open("it", nodes.image(str(path), "qcow2", alone=True))
        connection = opened.connect("it")
        assert content(image, chooser) == connection.wait(connection.read(0, image.size)).data


def test_what_was_set_aside_is_not_read(tmp_path: Path) -> None:
    """With preallocation, every cluster of the disk has its place, and the file system knows that nothing is there."""
    disk = create(tmp_path / "disk.qcow2", 1 << 30, "preallocation=metadata")
    qemu_io(disk, "write -qP 5 512M 1M")
    with DirectImage(str(disk)) as image:
        found, at = list[tuple[int, int]](), 0
        while at < image.size:
            for length, flags in image.status(at, image.size - at):
                found += [] if flags else [(at, length)]
                at += length
    assert found == [(512 * MIB, MIB)]


def test_an_answer_is_bounded_where_a_part_has_many_holes(tmp_path: Path) -> None:
    """All of the disk is one part, of the raw image that it is on"""
    below, disk = tmp_path / "below.raw", tmp_path / "disk.qcow2"
    with open(below, "wb") as file:
        for number in range(1500):
            file.seek(number * 131072)
            file.write(b"\1" * 65536)
        file.truncate(1500 * 131072)
    create(disk, below.stat().st_size, "", "-b", below.name, "-F", "raw")
    with dm.Host() as host, DirectImage(str(disk), host) as image:
        found, at = list[tuple[int, int]](), 0
        while at < image.size:
            answer = image.status(at, image.size - at)
            assert len(answer) <= 1024
            for length, flags in answer:
                found += [] if flags else [(at, length)]
                at += length
    assert found == [(number * 131072, 65536) for number in range(1500)]


def qemu_alone(folder: Path) -> list[Path]:
    """Images that are left to QEMU: by their own features, and by what they are on."""
    made = []
    for option in ("extended_l2=on", "compression_type=zstd", f"data_file={folder}/data,data_file_raw=on"):
        made.append(create(folder / f"{option.split('=')[0]}.qcow2", 8 * MIB, option))
    create(folder / "below.qcow2", 8 * MIB)
    qemu_img("create", "-q", "-f", "vmdk", folder / "below.vmdk", "8M")
    for name, form in ((f"file:{folder}/below.qcow2", "qcow2"), ("below.vmdk", "vmdk")):
        made.append(create(folder / f"on-{form}.qcow2", 8 * MIB, "", "-u", "-b", name, "-F", form))
    return made


def test_what_only_qemu_reads_is_left_to_it(tmp_path: Path) -> None:
    for number, disk in enumerate(qemu_alone(tmp_path)):
        direct = DirectImage(str(disk), dm.Host())
        with pytest.raises(dm.UnsupportedError, match="QEMU has to read"):
            direct.__enter__()
        qemu_io(disk, "write -qP 1 1M 3M", "write -qz 7M 64k")
        repository = tmp_path / f"repo-{number}"
        for _ in range(2):
            made = back_up(repository, disk)
            same(repository, made, disk)
            qemu_io(disk, "write -qP 2 2M 64k")
        with dm.Host() as host:
            assert verify_disk(host, repository, str(disk))[1] == []


def test_compressed_clusters_and_those_below_are_backed_up(tmp_path: Path) -> None:
    below, disk, repository = tmp_path / "below.qcow2", tmp_path / "disk.qcow2", tmp_path / "repo"
    qcow2_disk(tmp_path / "plain.qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", tmp_path / "plain.qcow2", below)
    create(disk, 32 * MIB, "", "-b", below.name, "-F", "qcow2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(creating, "Images", None)  # no QEMU
        for _ in range(2):
            qemu_io(disk, "write -qP 5 1M 64k")
            same(repository, back_up(repository, disk), disk)
        with dm.Host() as host:
            assert verify_disk(host, repository, str(disk))[1] == []


def test_what_a_disk_is_on_is_found_through_a_linked_folder(tmp_path: Path) -> None:
    """``..`` of a link is what is above its target, to QEMU, too; beside the link lies another image of the name."""
    there, here = tmp_path / "there" / "inner", tmp_path / "here"
    there.mkdir(parents=True)
    here.mkdir()
    (here / "link").symlink_to(there)
    qcow2_disk(there.with_name("below.qcow2"))
    create(here / "below.qcow2", 32 * MIB)
    create(there / "disk.qcow2", 32 * MIB, "", "-b", "../below.qcow2", "-F", "qcow2")
    disk = here / "link" / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", "link/../below.qcow2", "-F", "qcow2", here / "top.qcow2", "32M")
    for path in (disk, here / "top.qcow2"):
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, tmp_path / "expected")
        with dm.Host() as host, DirectImage(str(path), host) as image:
            assert content(image, random.Random(1)) == (tmp_path / "expected").read_bytes()
            assert (tmp_path / "expected").read_bytes()[0] == 7


def test_nobody_writes_to_what_a_disk_is_on(tmp_path: Path) -> None:
    below, disk, repository = tmp_path / "below.qcow2", tmp_path / "disk.qcow2", tmp_path / "repo"
    qcow2_disk(below)
    create(disk, 32 * MIB, "", "-b", below.name, "-F", "qcow2")
    with StorageDaemon(below):
        assert f"{below}: open for writing by" in error_of("backup", "create", disk, repository)

    def write_below() -> None:
        with dm.Host() as host, DirectImage(str(disk), host):
            with pytest.raises(ToolError, match="lock"):
                qemu_io(below, "write -qP 1 0 64k")
            patch(below, below.stat().st_size - 512, b"x")  # as one that does not go by the locks

    with pytest.raises(dm.LockedError, match=r"below\.qcow2: was written to"):
        write_below()


def test_a_file_that_ends_inside_its_last_cluster(tmp_path: Path) -> None:
    """As one does that other programs have written; the rest are zeros."""
    disk = create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=2M")
    qemu_io(disk, "write -qP 9 2M 2M")
    os.truncate(disk, disk.stat().st_size - 2 * MIB + 1000)
    with DirectImage(str(disk)) as image:
        assert content(image, random.Random(1)) == bytes(2 * MIB) + b"\t" * 1000 + bytes(2 * MIB - 1000)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, tmp_path / "expected")
    assert (tmp_path / "expected").read_bytes()[2 * MIB :] == b"\t" * 1000 + bytes(2 * MIB - 1000)


class Hostile:
    """An image with some clusters of data, and where its tables are."""

    def __init__(self, folder: Path, size: int = 1 << 30, cluster: int = 65536) -> None:
        self.path = folder / "hostile.qcow2"
        create(self.path, size, f"cluster_size={cluster}")
        qemu_io(self.path, "write -qP 1 0 128k")
        data = self.path.read_bytes()
        self.l1 = int.from_bytes(data[40:48], "big")
        self.l2 = int.from_bytes(data[self.l1 : self.l1 + 8], "big") & 0x00FFFFFFFFFFFE00

    def set(self, place: int, value: int) -> None:
        patch(self.path, place, value.to_bytes(8, "big"))


def table_behind(image: Hostile) -> str:
    image.set(image.l1, 1 << 40)
    return "an L2 table at 1099511627776 of the file, which has"


def table_beside(image: Hostile) -> str:
    image.set(image.l1 + 8, image.l2 + 512)
    return f"an L2 table at {image.l2 + 512} of the file, which is no beginning of a cluster"


def table_twice(image: Hostile) -> str:
    image.set(image.l1 + 8, 1 << 63 | image.l2)
    return f"an L2 table is used twice, the one at {image.l2} of the file"


def table_twice_far_apart(image: Hostile) -> str:
    """In blocks of the L1 table that are read one after the other."""
    small = Hostile(image.path.parent, 1 << 30, 512)
    small.set(small.l1 + 8 * 20_000, 1 << 63 | small.l2)
    return f"an L2 table is used twice, the one at {small.l2} of the file"


def data_behind(image: Hostile) -> str:
    image.set(image.l2 + 8, 1 << 50)
    return "a cluster at 1125899906842624 of the file, which has"


def data_beside(image: Hostile) -> str:
    image.set(image.l2, 3 << 9)
    return "a cluster at 1536 of the file, which is no beginning of a cluster"


def compressed_behind(image: Hostile) -> str:
    image.set(image.l2, 1 << 62 | (1 << 53))
    return "a compressed cluster at 9007199254740992 of the file is none"


def compressed_short(image: Hostile) -> str:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    patch(image.path, 1 << 20, (packer.compress(bytes(65535)) + packer.flush()).ljust(512, b"\0"))
    image.set(image.l2, 1 << 62 | 1 << 20)
    return "a compressed cluster at 1048576 of the file is none"


def below_itself(image: Hostile) -> str:
    qemu_img("rebase", "-u", "-b", image.path.name, "-F", "qcow2", image.path)
    return "it is on an image that is on it"


def below_each_other(image: Hostile) -> str:
    other = image.path.with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", image.path.name, "-F", "qcow2", other, "1M")
    qemu_img("rebase", "-u", "-b", other.name, "-F", "qcow2", image.path)
    return "it is on an image that is on it"


HOSTILE = [
    table_behind,
    table_beside,
    table_twice,
    table_twice_far_apart,
    data_behind,
    data_beside,
    compressed_behind,
    compressed_short,
    below_itself,
    below_each_other,
]


@pytest.mark.parametrize("harm", HOSTILE)
def test_tables_that_make_no_sense_are_refused_in_one_line(tmp_path: Path, harm: Callable[[Hostile], str]) -> None:
    image = Hostile(tmp_path)
    harmed = harm(image)
    error = error_of("backup", "create", image.path, tmp_path / "repo")
    assert "damaged: " + harmed in error


def overlapping(image: Hostile) -> None:
    """All clusters of a table are one."""
    first = image.path.read_bytes()[image.l2 : image.l2 + 8]
    patch(image.path, image.l2, first * 64)


def table_in_table(image: Hostile) -> None:
    """An L2 table that is the L1 table."""
    image.set(image.l1 + 8 * 9, image.l1)


@pytest.mark.parametrize("harm", [overlapping, table_in_table])
def test_tables_that_lie_are_read_as_qemu_reads_them(tmp_path: Path, harm: Callable[[Hostile], None]) -> None:
    image = Hostile(tmp_path, MIB, 512)
    harm(image)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image.path, tmp_path / "expected")
    with DirectImage(str(image.path)) as direct:
        assert content(direct, random.Random(1)) == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("behind", [65535, 65536])
def test_the_l1_table_may_end_behind_the_file_by_less_than_a_cluster(tmp_path: Path, behind: int) -> None:
    """As of an image that others are on, of which nothing else is looked at."""
    image = Hostile(tmp_path)
    entries = 16384
    patch(image.path, 36, entries.to_bytes(4, "big"))
    end = image.l1 + entries * 8
    os.truncate(image.path, end - behind)
    direct = DirectImage(str(image.path))
    if behind < 65536:
        with direct:
            assert direct.size == 1 << 30
        return
    with pytest.raises(dm.FormatError, match=f"the L1 table ends at {end} of the file, which has {end - behind} bytes"):
        direct.__enter__()


def test_flags_of_an_entry_are_no_table(tmp_path: Path) -> None:
    """Of the L1 table's 32768 entries, all say that there is no table; each block of 8192 is one part."""
    image = Hostile(tmp_path, 1 << 30, 512)
    patch(image.path, image.l1, (1 << 63).to_bytes(8, "big") * 32768)
    with DirectImage(str(image.path)) as direct:
        parts = list(direct.parts(0, direct.size))
    assert [(part.begin, part.end, part.kind) for part in parts] == [
        (at, at + 256 * MIB, MISSING) for at in range(0, 1 << 30, 256 * MIB)
    ]


def test_tables_in_holes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file can have millions of them; one that begins in a hole, but does not end there, is read."""
    cluster, tables, partly = 65536, 16384, 9000
    image = Hostile(tmp_path, tables << 29, cluster)
    data = image.path.read_bytes()
    first = -(-len(data) // cluster) * cluster
    places = [1 << 63 | first + number * cluster for number in range(tables)]
    patch(image.path, image.l1 + 8, b"".join(place.to_bytes(8, "big") for place in places[1:]))
    os.truncate(image.path, first + tables * cluster)
    image.set(first + partly * cluster + 8 * 8000, int.from_bytes(data[image.l2 : image.l2 + 8], "big"))
    reads, read_into = 0, files.Reading.read_into

    def counted(self: files.Reading, view: memoryview, offset: int) -> None:
        nonlocal reads
        reads += 1
        read_into(self, view, offset)

    monkeypatch.setattr(files.Reading, "read_into", counted)
    with DirectImage(str(image.path)) as direct:
        found = [(part.begin, part.end) for part in direct.parts(0, direct.size) if part.kind == DATA]
        at = (partly << 29) + 8000 * cluster
        assert found == [(0, 2 * cluster), (at, at + cluster)]
    assert reads < 10
    image.set(image.l1 + 8 * 5, first + 512)
    with DirectImage(str(image.path)) as direct, pytest.raises(dm.FormatError, match="no beginning of a cluster"):
        list(direct.parts(0, direct.size))


def test_memory_does_not_grow_with_the_disk(tmp_path: Path) -> None:
    """A disk of 16 TiB, with data at both ends."""
    size = (16 << 40) - MIB
    disk, repository = tmp_path / "disk.qcow2", tmp_path / "repo"
    create(disk, size)
    qemu_io(disk, "write -qP 1 0 2M", "write -qP 2 8T 1M", f"write -qP 3 {size - 512} 512")
    for words in (
        ["backup", "create", disk, repository],
        ["backup", "create", disk, repository],
        ["backup", "verify", repository, disk],
        ["backup", "verify", repository],
    ):
        said, _, resident = run_measured(*words)
        assert "Error" not in said, said
        assert resident < MEBIBYTES, words
    bitmap = Repository(repository).backups()[-1].bitmap
    said, _, resident = run_measured("rebuild", disk, bitmap, "--against", repository)
    assert "rebuilt" in said
    assert resident < MEBIBYTES
