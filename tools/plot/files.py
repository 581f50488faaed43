"""Makes a picture a file, PNG, SVG or HTML, by its ending. Needs what the extra ``plot`` of dirtmap installs."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dirtmap.fmt.errors import StorageError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtmap.tools.plot.reading import Picture

_SCALE = 2.0  # of a PNG: two of its pixels for each of the chart's, for screens that have as many


def _png(picture: Picture) -> bytes:
    import vl_convert

    from dirtmap.tools.plot.chart import chart

    return bytes(vl_convert.vegalite_to_png(chart(picture, zoom=False), scale=_SCALE))


def _svg(picture: Picture) -> bytes:
    import vl_convert

    from dirtmap.tools.plot.chart import chart

    return str(vl_convert.vegalite_to_svg(chart(picture, zoom=False))).encode()


def _html(picture: Picture) -> bytes:
    import vl_convert

    from dirtmap.tools.plot.chart import chart
    from dirtmap.tools.plot.page import page

    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return page(picture, chart(picture, zoom=True), library).encode()


_KINDS: dict[str, Callable[[Picture], bytes]] = {".png": _png, ".svg": _svg, ".html": _html}
ENDINGS = tuple(_KINDS)


def require_library(path: str) -> None:
    """Checks that such files can be made here.

    Raises:
        UnsupportedError: the extra is not installed.
    """
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        what = f"a picture as a file needs the Python package {error.name}: pip install 'dirtmap[plot]'"
        raise UnsupportedError(path, what) from error


def write(picture: Picture, path: str) -> None:
    """Makes the file, or replaces the one that is there, at once: it is never seen half written.

    Args:
        picture: what is drawn.
        path: ends in one of `ENDINGS`, in capitals or not.

    Raises:
        StorageError: the file cannot be written, or what is there is no regular file.
    """
    content = _KINDS[Path(path).suffix.lower()](picture)
    try:
        place = Path(path).resolve()  # a link goes on to be one
        if place.exists() and not place.is_file():
            raise StorageError(path, "is there, and is no regular file")
        number, name = tempfile.mkstemp(prefix=".dirtmap-", suffix=".tmp", dir=place.parent)
        temporary = Path(name)
        try:
            with open(number, "wb") as file:
                file.write(content)
            temporary.chmod(place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_umask())
            temporary.replace(place)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise StorageError(path, getattr(error, "strerror", None) or str(error)) from error


def _umask() -> int:
    """The permissions that new files do not get. It can be asked for by a change only."""
    found = os.umask(0o077)
    os.umask(found)
    return found
