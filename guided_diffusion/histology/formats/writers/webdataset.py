"""
webdataset: tar shards train-000000.tar, ..., of KEY.png, KEY.npz (inst_map and class_map) and KEY.json (the row of the
manifest).

Labels are arrays, for webdataset's decoders turn every picture into 8 bits, instance ids of 16 with it. Pictures come
in an order by lot, so that every shard has its share of real and synthetic ones.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .labelled import Entry, Example
from .writer import Writer, png

SHARD = 2**27  # bytes, about


class WebDataset(Writer):
    """See the module; `files` gives the members of a shard."""

    def files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        name = example.entry.name
        yield f"{name}.png", png(example.image)
        labels = {"inst_map": example.inst_map, **({"class_map": example.class_map} if self.told else {})}
        file = io.BytesIO()
        np.savez_compressed(file, **labels)
        yield f"{name}.npz", file.getvalue()
        about = {**example.entry.row, "split": example.entry.split, "nuclei": len(example.of_nucleus)}
        yield f"{name}.json", json.dumps(about).encode()


def by_lot(entries: Sequence[Entry]) -> list[Entry]:
    """:return: the entries of each split in an order by lot, which is the same in every run."""
    return sorted(entries, key=lambda one: (one.split, hashlib.sha256(one.name.encode()).digest()))


class Shards:
    """
    Tar files of about SHARD bytes, one after the other; a context manager, which closes the last.

    :param folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._counts: dict[str, int] = {}
        self._tar: tarfile.TarFile | None = None
        self._split = ""

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def add(self, split: str, members: Sequence[tuple[str, bytes]]) -> str:
        """Put an example's members next to each other. :return: the name of their shard."""
        if self._tar is not None and (split != self._split or self._tar.offset >= SHARD):
            self._close()
        if self._tar is None:
            number = self._counts.get(split, 0)
            self._counts[split], self._split = number + 1, split
            self._tar = tarfile.open(self.folder / f"{split}-{number:06d}.tar", "w")  # noqa: SIM115 - _close closes it
        for name, content in members:
            member = tarfile.TarInfo(name)  # of no owner and no time: the same bytes in every run
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        return Path(self._tar.name).name

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
