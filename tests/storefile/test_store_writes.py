"""What a commit writes, and what it knows of it afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from dirtmap.engine.storefile import header as headers
from dirtmap.engine.storefile.file import Store, create
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt import store


def test_a_commit_writes_whole_pages_and_knows_the_headers_that_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []

    class Noting(File):
        def write(self, offset: int, data: bytes | memoryview) -> None:
            written.append((offset, len(data)))
            super().write(offset, data)

    path = str(tmp_path / "store")
    create(path)
    with fileio.using(Noting), Store(path) as target:
        monkeypatch.setattr("dirtmap.engine.storefile.header.parse_block", None)
        for number in range(6):
            with target.change() as change:
                name = b"node %d" % number
                change.table.put(store.Record(name, store.KIND_NODE, bytes([number] * 16), 1 << 30))
            assert target.record(name)
        # Three header blocks of a commit, and its areas, some of them side by side.
        assert len(written) < 6 * 7
        assert not [one for one in written if one[0] % 4096 or one[1] % 4096]
        newest = target.choose(target._file)
    monkeypatch.undo()
    assert newest == headers.choose(path, Path(path).read_bytes()[: store.RESERVED])
