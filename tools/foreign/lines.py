"""Lines of an offset and a length in bytes, in any order, all of them dirty; sizes of `dirtmap.tools.sizes`.

0 65536
1M 64K
"""

from __future__ import annotations

import re

from dirtmap.fmt.errors import FormatError, counted
from dirtmap.tools.foreign.marks import Marks
from dirtmap.tools.inputs import Input
from dirtmap.tools.sizes import parse_size

_CHUNK = 1 << 20
_MOST_LINE = 4096
# Two numbers below 10**18 on each line: numpy may parse these. Possessive, so that nothing is tried twice.
_PLAIN_LINES = re.compile(rb"(?:[ \t]*+[0-9]{1,18}+[ \t]++[0-9]{1,18}+[ \t]*+\r?+\n)*+")


def read(source: Input, marks: Marks) -> None:
    """Marks all ranges.

    Raises:
        FormatError: a line has not got two sizes, is too long, or the last one does not end with a newline.
        RangeError: a range leaves the disk.
    """
    marks.unit = "line"
    rest = b""
    while data := source.read(_CHUNK):
        end = data.rfind(b"\n") + 1
        if end:
            _take(rest + data[:end], marks)
            rest = b""
        rest += data[end:]
        if len(rest) > _MOST_LINE:
            raise FormatError(f"{source.where}: line {marks.count + 1}", f"longer than {_MOST_LINE} bytes")
    if rest:
        what = "cut off: it does not end with a newline"
        raise FormatError(f"{source.where}: line {marks.count + 1}", what)


def _take(lines: bytes, marks: Marks) -> None:
    import numpy as np

    if _PLAIN_LINES.fullmatch(lines):
        numbers = np.fromstring(lines, np.int64, sep=" ")
        marks.add_many(numbers[0::2], numbers[1::2])
        return
    for line in lines.split(b"\n")[:-1]:
        marks.next()
        words = line[:_MOST_LINE].decode("ascii", "backslashreplace").split()
        if not words:
            continue
        if len(words) != 2:
            raise marks.error(f"{counted(len(words), 'word')} instead of an offset and a length")
        try:
            offset, length = map(parse_size, words)
        except ValueError as error:
            raise marks.error(str(error)) from error
        marks.add(offset, length)
