"""What --results_path may be, and which run it belongs to: run.json holds the flags that decide what is written; and
that nothing is written among data. Knows nothing of how samples are made."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import files
from .magnification import REFERENCE_MPP
from .results import FOLDERS, MANIFEST, RUN, ResultFolder, folder_name
from .unlabelled import folder_names


def check_outside(path: str, flag: str, data_dir: str = "", **folders: str) -> None:
    """
    Refuse a folder to write to where pictures in it would pass for data.

    :param flag: what the path was given by; data_dir: with images in the folders below it.
    :param folders: flag -> folders of images or masks, with commas between them.
    :raises ValueError: naming the flag of what the path lies in.
    """
    data, place = Path(data_dir).resolve(), Path(path).resolve()
    split = place.relative_to(data).parts[:1] if data_dir and place.is_relative_to(data) else None
    if split is not None and (not split or (data.joinpath(*split) / "images").is_dir()):
        raise ValueError(f"{flag} {path} lies among the images of --data_dir {data_dir}: give another folder")
    for name, text in folders.items():
        for folder in folder_names(text):
            if place.is_relative_to(Path(folder).resolve()):
                raise ValueError(f"{flag} {path} lies in --{name} {folder}: give another folder")


def check_results_path(path: str, data_dir: str = "", appearance_dir: str = "", structure_dir: str = "") -> None:
    """
    :param data_dir: the data that are sampled from; appearance_dir: the images without masks; structure_dir: the masks
        without images.
    :raises ValueError: where a results folder cannot be made at the path, or would mix with the data.
    """
    files.check_place(path)
    check_outside(path, "--results_path", data_dir, appearance_dir=appearance_dir, structure_dir=structure_dir)
    strangers = [name for name in FOLDERS if os.path.lexists(Path(path) / name)]
    known = (Path(path) / MANIFEST).is_file() or (Path(path) / RUN).is_file()
    if strangers and not known:
        raise ValueError(f"--results_path {path} holds {strangers[0]} that no sampling run made: give another folder")


def check_same_run(path: str, config: Mapping[str, Any], older: Mapping[str, Any]) -> None:
    """
    Compare a run with the one that a results folder was begun by.

    :param config: flag -> value, of all that decides what is written; older: what a run had that began before there was
        such a flag.
    :raises ValueError: naming the first flag that differs.
    """
    file = Path(path) / RUN
    if not file.exists():
        if (Path(path) / MANIFEST).exists():
            raise ValueError(f"--results_path {path} holds samples of an unknown run: give another folder")
        return
    try:
        before = dict(files.read_json(file))
    except (ValueError, TypeError):
        raise ValueError(f"{file} does not parse: give another --results_path, or --overwrite True") from None
    if "mpp" in config:
        before.setdefault("mpp", REFERENCE_MPP)  # earlier versions knew 40x alone
    for name in sorted({*before, *config}):
        then = before if name in before else older
        if then.get(name) != config.get(name) and (name in then or config[name]):
            raise ValueError(
                f"--results_path {path} was begun with --{name} {then.get(name)}, this run has "
                f"{config.get(name)}: give another folder, or --overwrite True to start anew"
            )


@contextlib.contextmanager
def claimed(path: str, config: dict[str, Any], older: Mapping[str, Any], overwrite: bool = False) -> Iterator[None]:
    """
    Have a results folder to oneself while the with block lasts; run.json says from now on which run it belongs to.

    :param config, older: see check_same_run.
    :param overwrite: delete what an earlier run left.
    :raises ValueError: where another run is at it, or has begun it with other flags.
    """
    with files.locked(path, "--results_path"):
        if overwrite:
            remove_run(path)
        check_same_run(path, config, older)
        files.write_json(Path(path) / RUN, config)
        yield


def remove_run(path: str) -> None:
    """Delete what an earlier run wrote in its results folder: its own samples, and a sweep's in the folders below."""
    for manifest in Path(path).glob(f"*/{MANIFEST}"):
        folder = ResultFolder(manifest.parent)
        made_here = {folder_name(row["checkpoint"], row["s"]) for row in folder.rows().values()} == {folder.path.name}
        # Else it is a folder of another run, or what a later stage made of samples.
        if made_here and not (folder.path / RUN).exists():
            folder.remove()
            with contextlib.suppress(OSError):  # what holds other files stays
                folder.path.rmdir()
    ResultFolder(path).remove()
