"""Whether another user may have put a file where it is, or can replace it: root must not believe what is in it.

A store tells which images a name means, and an index which stores there are: whoever can write them can have root read
and change any file as if it was that image. So root takes none that belongs to another user, that others may write, or
that is in a folder of which either is true; a folder with the sticky bit keeps what is in it to its owner.
Source: OpenSSH's auth_secure_path (misc.c), which is as strict, for each of a path's folders.
"""

from __future__ import annotations

import os
import stat

_ROOT = 0
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: str, trusted: set[str]) -> str | None:
    """Why root must not believe what is at a path; None where it may, where nothing is there, and for other users.

    Args:
        path: absolute; of a file or a folder. Links on the way to it are checked as well.
        trusted: paths of which that is known. Takes in this one and its folder, so that the next file in that folder
            costs one look.
    """
    if path in trusted or os.geteuid() != _ROOT or "\0" in path:  # no file can have such a path; whoever opens it tells
        return None
    folder = os.path.dirname(path)
    if folder in trusted and not os.path.islink(path):
        reason = _reason(path, is_file=True)
    else:
        reason = _reason_on_the_way(path, os.path.realpath(path))
    if reason is None and os.path.exists(path):  # what is not there yet may be anybody's once it is
        trusted.update((folder, path))
    return reason


def _reason_on_the_way(path: str, real: str) -> str | None:
    """What is wrong with what is at a path, or with a folder or a link on the way; ``real`` is where it leads."""
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
        return None  # what is not there has nobody's word in it; whoever opens it tells why it cannot be
    for owner in (link.st_uid, status.st_uid):
        if owner != _ROOT:
            return f"{path} belongs to user {owner}, who can replace it"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return None  # such as /dev/null: whoever opens it tells that it is no store, and no index
    if status.st_mode & _OTHERS and (is_file or not status.st_mode & stat.S_ISVTX):
        whom = "every user" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        return f"{path} can be written by {whom}"
    return None
