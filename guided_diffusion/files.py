"""
Files: which there are, written whole or not at all, and folders that one run at a time writes to. The only place that
lists data folders, renames and syncs.

Knows nothing of what the files hold, of flags but by the names it is told, and of ranks.
"""

import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import blobfile as bf

LOCK = ".lock"  # in a folder that a run writes to
# What a name may hold on a disk and a line of UTF-8 may not: control characters, line separators, lone surrogates.
_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

_FORMULA = re.compile(r"(?:^|/)[=+\-@]")  # names go into manifests


def is_remote(path: str | Path) -> bool:
    """:return: whether a path is a URL, which blobfile reads and writes."""
    return "://" in str(path)


def is_file(path: str) -> bool:
    """
    :return: whether there is such a file.
    :raises OSError: where that cannot be found out.
    """
    if is_remote(path):
        return bf.exists(path) and not bf.isdir(path)
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


# ---- which files there are ----


def list_files(folder: str | Path, suffixes: Sequence[str], deep: bool = False) -> list[str]:
    """
    List the files of a folder; hidden ones are passed over, links are followed.

    :param folder: a folder, which exists, or a blobfile URL of one.
    :param suffixes: in lower case, with their dots; files may have them in upper case.
    :param deep: those in sub-folders, too.
    :return: paths that begin with the folder as it was given, sorted.
    :raises ValueError: where a path is not UTF-8 or holds control characters, which no manifest could keep, a name
        begins as a spreadsheet's formula does, or what it names is a pipe or a device.
    """
    paths = sorted(_walk(str(folder), deep, suffixes))
    above = "" if is_remote(folder) else os.getcwd()  # features.npz and links hold absolute paths
    for path in (above, *paths):
        check_path(path)
    for path in paths:
        if _FORMULA.search(path[len(str(folder)) :]):
            raise ValueError(f"{path}: a name that begins with =, +, - or @ is a formula to spreadsheets: rename it")
    return paths


def by_stem(folder: str | Path, suffixes: Sequence[str], deep: bool = False) -> dict[str, str]:
    """
    Find the files of a folder by their stems: their paths below it, without suffix, which name their partners in other
    folders, however their accents are spelt (NFC or, as macOS does, NFD). Parameters as list_files'.

    :return: stem, in NFC -> path, sorted by stem.
    :raises ValueError: as list_files, and where two files share a stem.
    """
    paths: dict[str, str] = {}
    for path in list_files(folder, suffixes, deep):
        stem = nfc(os.path.splitext(path[len(str(folder)) :].lstrip("/"))[0])
        if stem in paths:
            raise ValueError(f"{paths[stem]} and {path} share a stem: keep one of them")
        paths[stem] = path
    return dict(sorted(paths.items()))


def nfc(name: str) -> str:
    """:return: a name with its accents spelt as Linux and Windows do, so that it can be compared."""
    return unicodedata.normalize("NFC", name)


def _walk(folder: str, deep: bool, suffixes: Sequence[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder, by paths that begin with it; a link to a folder that holds it is not followed."""

    def wanted(name: str) -> bool:
        return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes

    if is_remote(folder):
        for root, _, names in bf.walk(folder):
            if "/." not in root[len(folder) :] and (deep or root.rstrip("/") == folder.rstrip("/")):
                yield from (bf.join(root, name) for name in names if wanted(name))
        return
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                if wanted(entry.name):
                    if not entry.is_file():
                        check_content(path)
                    yield path
            elif deep and os.path.realpath(path) not in above:
                yield from _walk(path, deep, suffixes, above)


def check_content(path: str | Path) -> None:
    """:raises ValueError: where a local path is a pipe or a device, whose content may never come, or never end."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):
        return  # who opens it says why it cannot be read
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{path} is no file, but a pipe or a device: remove it")


def check_path(path: str) -> None:
    """:raises ValueError: where a line of UTF-8 cannot hold a path."""
    found = _UNWRITABLE.findall(path)
    if found:
        what = "is not UTF-8" if max(found) >= "\ud800" else "has control characters"
        raise ValueError(f"{_UNWRITABLE.sub(_shown, path)}: a name that {what} fits no manifest: rename it")


def check_place(path: str | Path, flag: str = "--results_path") -> None:
    """:raises ValueError: where a folder to write to cannot be made at the path, which was given by a flag."""
    if not str(path):
        raise ValueError(f"{flag} is empty: give the folder to write to")
    if is_remote(path):
        raise ValueError(f"{flag} {path} is a URL: give a local folder")
    check_path(str(path))
    nearest = Path(path)
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{flag} {path}: {nearest} is a file, or a link that leads nowhere: give a folder")
    try:
        if not os.access(nearest, os.W_OK):
            raise PermissionError
        if nearest != Path(path):  # its mode does not tell of all that may stand against it
            trial = nearest / f".{os.getpid()}.part"
            os.mkdir(trial)
            os.rmdir(trial)
    except OSError:
        raise ValueError(f"{flag} {path}: {nearest} cannot be written to; give another folder") from None


def _shown(match: re.Match) -> str:
    """Escape a character that cannot be shown; a byte that is no UTF-8 is one of U+DC80 ... U+DCFF in Python."""
    number = ord(match[0])
    return f"\\x{number & 0xFF:02x}" if number >= 0xD800 else f"\\u{number:04x}"


# ---- writing ----


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


def leading(target: Path, place: Path, real: Callable[[str | Path], str] = os.path.realpath) -> str:
    """
    :param target: a file, and place, that of a link to it.
    :param real: resolves the links in a folder's path; one that remembers is faster where links are many.
    :return: what the link has to say: relative, from where its folder really is, from which links are followed.
    """
    return os.path.relpath(os.path.join(real(target.parent), target.name), real(place.parent))


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


def csv_text(fields: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """:return: a CSV with a header; a field that a row lacks is empty, and others than `fields` are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_link(path: str | Path, target: str | Path) -> None:
    """Make a symbolic link, in the place of what file or link was there."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        os.symlink(target, aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check_apart(out: Path, inputs: Sequence[Path], replaced: Path, flag: str = "--results_path") -> None:
    """
    Refuse an output that lies in an input, and one that would replace an input.

    :param out: where files are to be written; replaced: the folder in it, or itself, that is rewritten.
    :param flag: what `out` was given by.
    :raises ValueError: naming the two.
    """
    check_place(out, flag)
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{flag} {out} lies in the input {folder}: give a folder outside")
        if folder.resolve().is_relative_to(replaced.resolve()):
            raise ValueError(f"{flag} {out} would replace the input {folder}: give another folder")


def replace_folder(path: str | Path, fill: Callable[[Path], None], flag: str) -> None:
    """
    Make a local folder aside and put it in the place of what is there, which must be a folder or nothing.

    Killed at any time, this leaves the whole old folder or the whole new one; between the two renames as .NAME.old,
    which the next call puts back first.

    :param fill: is given the folder aside, in the same parent, so that relative links in it stay right.
    :param flag: what the path was given by, for the error.
    :raises ValueError: where another process is replacing it.
    """
    # A link stays, and what it leads to is replaced.
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    aside, before = (path.with_name(f".{path.name}.{end}") for end in ("part", "old"))
    with locked(aside, flag):
        if before.is_dir() and not os.path.lexists(path):
            os.replace(before, path)
        _remove(before)
        for leftover in aside.iterdir():
            if leftover.name != LOCK:
                _remove(leftover)
        try:
            fill(aside)
        except BaseException:
            _remove(aside)
            raise
        if path.exists():
            os.replace(path, before)
        os.replace(aside, path)
        (path / LOCK).unlink()
        _remove(before)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a power cut, too, where the file system can sync folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path, name: str = "") -> None:
    """Delete what killed runs had begun to write in a local folder, or of one file in it; for who holds its lock."""
    if not is_remote(folder) and os.path.isdir(folder):
        for path in Path(folder).glob(f".{glob.escape(name)}.*.part" if name else ".*.part"):
            if path.is_symlink() or not path.is_dir():  # a folder is replace_folder's, which goes on from it
                path.unlink(missing_ok=True)


# ---- one run at a time ----


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
        if not os.path.exists(file.name) or not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise ValueError(f"{flag} {folder} was in use a moment ago: try again")  # whose lock was not left there
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _in_use(folder: Path) -> bool:
    """Whether another process has a folder locked."""
    try:
        with open(folder / LOCK, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def claimed(folder: str | Path, flag: str) -> Iterator[None]:
    """
    Have a folder to oneself, as by locked, with nothing in it or in two floors of its folders that a killed run had
    begun to write, but for folders that another run has. The lock's file goes at the end, for a folder that others
    read.
    """
    with locked(folder, flag):
        remove_leftovers(folder)
        for inner in Path(folder).glob("*/"):
            if not _in_use(inner):
                for place in (inner, *(deeper for deeper in inner.glob("*/") if not _in_use(deeper))):
                    remove_leftovers(place)
        try:
            yield
        finally:
            (Path(folder) / LOCK).unlink(missing_ok=True)


# ---- reading what others may have written ----


def read_bytes(path: str | Path) -> bytes:
    """
    :param path: local, or a blobfile URL.
    :raises FileNotFoundError, OSError: where it cannot be read. :raises ValueError: as check_content.
    """
    check_content(path)
    with bf.BlobFile(str(path), "rb") as file:
        return file.read()


def read_json(path: str | Path) -> Any:
    """:return: what a JSON file says. :raises OSError, ValueError: as read_bytes and parse_json."""
    return parse_json(read_bytes(path))


def parse_json(text: str | bytes) -> Any:
    """
    :return: what a JSON file's content says.
    :raises ValueError: where it is none, or nested so deeply that no program of ours wrote it.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


@contextlib.contextmanager
def reading_table(path: str | Path) -> Iterator[None]:
    """Have what Python's csv module refuses, as a field of 128 KiB, be a ValueError that names the file."""
    check_content(path)
    try:
        yield
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable table ({error}): restore it") from None


# ---- telling files apart ----


def fingerprint(paths: Sequence[str], sizes: int = 64) -> str:
    """
    Tell one set of files from another, wherever it lies, without reading them.

    :param paths: local paths or blobfile URLs.
    :param sizes: how many local files' sizes count, evenly chosen; names below the common folder count of all.
    :return: 16 hexadecimal digits; "" of no files.
    """
    if not paths:
        return ""
    root = os.path.commonprefix(paths).rpartition("/")[0]  # noqa: RUF071 - of URLs, too
    paths = sorted(paths)
    every = -(-len(paths) // sizes)
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        size = os.path.getsize(path) if number % every == 0 and not is_remote(path) else None
        digest.update(repr((path[len(root) :], size)).encode())
    return digest.hexdigest()[:16]
