"""
Files: written whole or not at all, and folders that one run at a time writes to. The only place that renames and syncs.

Knows nothing of what the files hold, of flags but by the names it is told, and of ranks.
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import blobfile as bf

LOCK = ".lock"  # in a folder that a run writes to


def is_remote(path: str | Path) -> bool:
    """:return: whether a path is a URL, which blobfile reads and writes."""
    return "://" in str(path)


@contextlib.contextmanager
def writing(path: str | Path, mode: str = "wb", durable: bool = True) -> Iterator[IO[Any]]:
    """
    Open a file to write it whole or not at all: aside first, then renamed, when the with block ends without an error.

    Several processes may write the same path at once; the last one wins.

    :param path: a local path, whose folder exists, or a blobfile URL.
    :param mode: "wb", or "w" for text in UTF-8 with line endings as they are written.
    :param durable: also survive a power cut, which takes a few milliseconds; not needed where a reader checks that the
        file is whole, as of the many pictures of a run.
    :raises OSError: naming the path, where it cannot be written; what was there before stays.
    """
    text = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    if is_remote(path):
        with bf.BlobFile(str(path), mode) as file:  # whole by itself: an object appears when it is closed
            yield file
        return
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(aside, mode, **text) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        # torch and zipfile close their archives after a full disk, too, and complain of that instead.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"cannot write {path}: {cause.strerror or cause}") from None
        raise


def write_bytes(path: str | Path, data: bytes, durable: bool = True) -> None:
    """Write a file whole or not at all, see writing."""
    with writing(path, "wb", durable) as file:
        file.write(data)


def write_text(path: str | Path, text: str, durable: bool = True) -> None:
    """Write a UTF-8 text file whole or not at all, see writing."""
    with writing(path, "w", durable) as file:
        file.write(text)


def write_json(path: str | Path, value: Any, durable: bool = True) -> None:
    """Write a value as indented JSON with a final newline, whole or not at all, see writing."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable)


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a power cut, too, where the file system can sync folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Delete what killed runs had begun to write in a local folder; only for who holds its lock."""
    if not is_remote(folder) and os.path.isdir(folder):
        for path in Path(folder).glob(".*.part"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: str | Path, flag: str) -> Iterator[None]:
    """
    Keep other runs out of a folder while the with block lasts; the end of the process, killed even, gives it back.

    The lock belongs to this process, not to those that it forks. A URL is not locked; neither is a folder on a file
    system without locks.

    :param folder: it is made where it is missing.
    :param flag: what the folder was given by, for the error.
    :raises ValueError: where another run has it, naming that run's machine and process.
    """
    if is_remote(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder) / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            who = file.read().strip() or "another process"
            raise ValueError(f"{flag} {folder} is in use by {who}: stop that, or give another folder") from None
        except OSError:
            pass  # no locks here: better unguarded than not at all
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
