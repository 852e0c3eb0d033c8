"""
Images without masks to learn from: which there are, and which of them must not be learned from, since they are held
out or a copy of what is labelled. Knows files by size and content, not what they show.
"""

import hashlib
import os
from collections.abc import Sequence

import blobfile as bf

from .files import is_remote
from .images import Item, list_images
from .slides import without_number

_BLOCK = 4096  # bytes from the middle of a file, in which images of equal size differ as a rule


def list_unlabelled(folders: str, labelled: Sequence[Item], hidden: Sequence[Item]) -> tuple[list[Item], int]:
    """
    List the images to learn from beside the labelled ones.

    A copy is found where its bytes are the same; where it was saved anew or cut otherwise, by its slide alone.

    :param folders: folders, or blobfile URLs of such, with commas between them; "" of none.
    :param labelled: what is trained on with masks; its copies are left out.
    :param hidden: what must not be learned from: held-out and test images.
    :return: the images, in the order of the folders and their names; and how many copies were left out.
    :raises ValueError: where one is a copy of a hidden image or of its slide, or nothing is left.
    :raises FileNotFoundError: where there is no such folder.
    """
    if not folders:
        return [], 0
    images = [item for name in folder_names(folders) for item in list_images(name, "--unlabelled_dir")]
    slides = {item.slide for item in hidden}
    for item in images:
        # The second is of a name: where slides are guessed and each image is one, it has the patch's number.
        for slide in slides & {item.slide, without_number(item.slide.rpartition("/")[2])}:
            raise ValueError(
                f"--unlabelled_dir: {item.image} is of slide {slide}, which is held out of --data_dir or in its test "
                "set: remove it; if it is of another slide, say so in a slides.csv beside it"
            )
    copies = _copies([item.image for item in images], [item.image for item in (*labelled, *hidden)])
    unseen = {item.image for item in hidden}
    for path, original in copies.items():
        if original in unseen:
            raise ValueError(
                f"--unlabelled_dir: {path} is a copy of {original}, which is held out or in the test set: remove it"
            )
    if len(copies) == len(images):
        raise ValueError(f"--unlabelled_dir {folders} holds nothing but copies of labelled images: leave it out")
    return [item for item in images if item.image not in copies], len(copies)


def folder_names(folders: str) -> list[str]:
    """:return: the folders that a text names, with commas between them; a comma may be part of one that is alone."""
    if not folders:
        return []
    names = [folders] if bf.isdir(folders) else folders.split(",")
    return list(dict.fromkeys(name.rstrip("/") or name for name in names))


def _copies(paths: Sequence[str], originals: Sequence[str]) -> dict[str, str]:
    """
    Which local files are copies of others: path -> an original. Contents are read where sizes are the same, and whole
    ones where a block from the middle is, too; so that as good as nothing is read of a hundred thousand files.
    """
    pairs = [[path for path in files if not is_remote(path)] for files in (paths, originals)]
    for look in (os.path.getsize, _middle, _whole):
        seen = [{path: look(path) for path in files} for files in pairs]
        both = set(seen[0].values()) & set(seen[1].values())
        pairs = [[path for path in files if found[path] in both] for files, found in zip(pairs, seen)]
    known = {seen[1][path]: path for path in reversed(pairs[1])}
    return {path: known[seen[0][path]] for path in pairs[0]}


def _middle(path: str) -> tuple[int, bytes]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _BLOCK) // 2)
        return size, hashlib.sha256(file.read(_BLOCK)).digest()


def _whole(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
