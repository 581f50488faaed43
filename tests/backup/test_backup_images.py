"""Images that are written and read without QEMU, judged by QEMU."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from support.qemu import check, qemu_img

import dirtmap.engine as dm
from dirtmap.tools.backup.copying import Data, Writer
from dirtmap.tools.backup.direct import DirectImage
from dirtmap.tools.backup.imaging import NewImage
from dirtmap.tools.backup.opened import Images
from dirtmap.tools.backup.raw import RawSource
from dirtmap.tools.qsd import nodes


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("size", [0, 1, 5 << 20, (9 << 20) + 77])
def test_qemu_reads_what_was_written(tmp_path: Path, cluster: int, size: int) -> None:
    """Data, zeros and nothing, over the ends of L2 tables and up to the end of a disk of any size; on another image."""
    chooser, below, path = random.Random(size + cluster), str(tmp_path / "below.qcow2"), str(tmp_path / "new.qcow2")
    contents = [chooser.randbytes(size), chooser.randbytes(size)]
    with NewImage(below, size, cluster=cluster) as image:
        writer = Writer(image, cluster)
        writer.write(Data(0, size, bytearray(contents[0])))
        writer.finish()
    expected, parts, at = bytearray(contents[0]), list[tuple[int, bytes]](), 0
    with NewImage(path, size, cluster=cluster, backing="below.qcow2") as image:
        writer = Writer(image, cluster, zeros=image)
        while at < size:
            end = min(size, at + chooser.randrange(1, 1 + (1 << 20) // cluster) * cluster)
            kind = chooser.choice(["data", "zeros", "hole", "nothing"])
            data = contents[1][at:end] if kind == "data" else bytes(end - at)
            if kind != "nothing":
                writer.write(Data(at, end - at, None if kind == "hole" else bytearray(data)))
                expected[at:end] = data
                parts.append((at, data))
            at = end
        writer.finish()
    check(Path(path))
    (tmp_path / "expected").write_bytes(expected)
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", tmp_path / "expected", path)
    with DirectImage(path) as direct, Images() as opened:
        opened.open("it", nodes.image(path, "qcow2", alone=True))
        connection = opened.connect("it")
        for at, data in parts:
            answer = direct.wait(direct.read(at, len(data)))
            assert answer.data == data == connection.wait(connection.read(at, len(data))).data


class Kept:
    """A target that notes what is written."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []

    def write(self, offset: int, data: memoryview) -> int:
        self.written.append((offset, len(data)))
        return 0

    def wait(self, token: int) -> None: ...

    def flush(self) -> None: ...


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
def test_a_cluster_with_a_single_byte_is_no_zeros(cluster: int) -> None:
    for place in (0, 7, 8, cluster // 2 + 1, cluster - 1):
        data, target = bytearray(4 * cluster + 3), Kept()
        data[cluster + place] = data[-1] = 1
        assert not Writer(target, cluster).write(Data(0, len(data), data))
        assert target.written == [(cluster, cluster), (4 * cluster, 3)]


def test_what_is_read_into_again_is_new(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * (1 << 20) + b"b" * (1 << 20))
    with RawSource(str(path), 2 << 20) as source:
        first = source.wait(source.read(0, 1 << 20)).data
        source.recycle(first)
        second = source.wait(source.read(1 << 20, 1 << 20)).data
        assert second is first
        assert second == b"b" * (1 << 20)
        assert source.wait(source.read(0, 1 << 20)).data == b"a" * (1 << 20)
        source.recycle(bytearray(5))
        assert source.wait(source.read(0, 5)).data == b"aaaaa"


def test_a_disk_that_needs_larger_clusters(tmp_path: Path) -> None:
    with pytest.raises(dm.UnsupportedError, match="512-byte clusters"):
        NewImage(str(tmp_path / "new"), 1 << 40, cluster=512)
    assert not (tmp_path / "new").exists()


def test_no_number_in_an_image_is_trusted(tmp_path: Path) -> None:
    """Whatever is in its tables, reading gives bytes or an error of ours."""
    path, chooser = tmp_path / "image", random.Random(1)
    with NewImage(str(path), 1 << 20, cluster=4096) as image:
        image.write(0, memoryview(bytearray(chooser.randbytes(1 << 20))))
        image.flush()
    whole = path.read_bytes()
    l1 = int.from_bytes(whole[40:48], "big")
    l2 = int.from_bytes(whole[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    for place in (24, 32, 36, 40, l1, l2):
        for value in (bytes(8), b"\xff" * 8, chooser.randbytes(8), (1 << 62).to_bytes(8, "big")):
            path.write_bytes(whole[:place] + value + whole[place + 8 :])
            with contextlib.suppress(dm.Error), DirectImage(str(path)) as direct:
                assert len(direct.wait(direct.read(0, 1 << 20)).data) == 1 << 20
