"""Sessions that no tracker has begun, and the logs that go with them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from dirtmap.engine.session.intent import IntentLog, read_log
from dirtmap.engine.system import file as fileio
from dirtmap.engine.system.file import File
from dirtmap.fmt import live
from dirtmap.fmt.structures.live import build_log_record, build_tally, record_seed

UUID = bytes(range(16))


class NoSync(File):
    """A file whose syncs take no time."""

    def sync(self) -> None:
        self._refuse_if_poisoned()


def a_session(path: Path, uuid: bytes = UUID, **fields: Any) -> live.Session:
    """A session that has its log there, with regions of 1 MiB."""
    session = replace(live.NO_SESSION, uuid=uuid, intent=live.INTENT_REGION, log_path=os.fsencode(path))
    return replace(session, **fields)


def a_log(path: Path, size: int, logs: list[list[list[int]]], uuid: bytes = UUID, *, first: int = 0) -> None:
    """Writes a log of a disk of ``size`` bytes: for each log, from that number on, its appends, each of regions."""
    with fileio.using(NoSync):
        log = IntentLog(str(path), uuid, live.INTENT_REGION, live.MIN_REGION_BITS, size)
        for number, appends in enumerate(logs, first):
            seed, count = record_seed(uuid, number), 0
            for regions in appends:
                for region in regions:
                    log.write(live.record_offset(region, number), build_log_record(seed, region))
                count += len(regions)
                log.write(live.TALLIES[number % 2], build_tally(uuid, number, count))
        log.close(remove=False)


def regions_of(path: Path, size: int, number: int = 0, uuid: bytes = UUID) -> set[int] | None:
    """What the log says where the session names ``number`` as its oldest; None where it says nothing."""
    found = read_log(a_session(path, uuid, log=number), size)
    return None if found is None or found.regions is None else set(found.regions)
