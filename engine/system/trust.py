"""`distrust`: why root must not believe a file. Another user may have put it where it is, or can replace it.

A store tells which image a name means, and an index which stores there are. Whoever can write to them can make root
read and change any file as if it was that image. So root refuses one that belongs to another user, one that others may
write to, and one in a folder of which either is true. In a folder with the sticky bit only the owner of a file can
replace it, so there it does not matter that others may write to the folder.
Source: OpenSSH's auth_secure_path (misc.c), which is as strict about each folder of a path.
"""

from __future__ import annotations

import os
import stat

_ROOT = 0
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, trusted: set[str]) -> str | None:
    """Why root must not believe what is at a path; None if it may, if nothing is there, and for other users.

    Args:
        path: of a file or a folder, absolute. Links on the way to it are checked as well.
        trusted: paths that are known to be trusted. This path and its folder are added, so that the next file in the
            folder takes one check only.
    """
    if path in trusted or os.geteuid() != _ROOT or "\0" in path:  # no file has such a path: an open fails
        return None
    folder = os.path.dirname(path)
    if folder in trusted and not os.path.islink(path):
        reason = _reason(path, is_file=True)
    else:
        reason = _reason_on_the_way(path, os.path.realpath(path))
    if reason is None and os.path.exists(path):  # a file that is made later may be anybody's
        trusted.update((folder, path))
    return reason


def _reason_on_the_way(path: str, real: str) -> str | None:
    """What is wrong with what is at a path, or with a folder or a link on the way. ``real`` is where the path leads."""
    seen: set[str] = set()
    for start in dict.fromkeys((path, real)):
        at = start
        while at not in seen:
            seen.add(at)
            if (reason := _reason(at, is_file=at == real)) is not None:
                return reason
            at = os.path.dirname(at)
    return None


def _reason(path: str, *, is_file: bool) -> str | None:
    """What is wrong with a file, or with a folder or a link on the way to it."""
    try:
        link, status = os.lstat(path), os.stat(path)
    except (OSError, ValueError):
        return None  # what is not there cannot mislead anyone: an open fails, and says why
    for owner in (link.st_uid, status.st_uid):
        if owner != _ROOT:
            return f"{path} belongs to user {owner}, who can replace it"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return None  # such as /dev/null, which is neither a store nor an index: whatever opens it says so
    if status.st_mode & _OTHERS and (is_file or not status.st_mode & stat.S_ISVTX):
        whom = "every user" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        return f"{path} can be written by {whom}"
    return None
