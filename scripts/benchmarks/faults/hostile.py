"""Files, names and links that were made to do harm: to run code, to fill memory, to write elsewhere."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from guided_diffusion.slides import write_table

MARKER = "code was run"  # a file in the trial's folder
GIB = 2**30
SIDE = 60_000  # px, of pictures that are none
EVIL = "../../evil"
LONG = 300 * "n"
ODD = ("it's", 'a "quote"', "a; rm -rf b", "$(touch c)", "%s %d", "ünï")


class Payload:
    """What runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickled(path: Path, folder: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(folder / MARKER)))


def torch_pickled(path: Path, folder: Path) -> None:
    """As torch.save lays it out."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(folder / MARKER), 2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def npz_pickled(path: Path, folder: Path) -> None:
    array = np.array([Payload(folder / MARKER)], dtype=object)
    with open(path, "wb") as file:
        np.savez(file, features=array, paths=array, backbone=array)


def zeros(size: int) -> bytes:
    """:return: a raw deflate stream of so many zeros, in no time."""
    maker = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = maker.compress(bytes(2**20)) + maker.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 20) + maker.flush()


def zip_bomb(path: Path, folder: Path) -> None:
    """An archive of 4 MB whose members of 3 GiB have the names that are looked for; their checksums are wrong."""
    header = npy_header(3 * GIB >> 16, 1 << 14)
    size, packer = len(header) + 3 * GIB, zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(3 * GIB)
    body, index = io.BytesIO(), io.BytesIO()
    for name in (b"features.npy", b"archive/data.pkl"):
        facts = struct.pack("<5HIIIHH", 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0)
        index.write(struct.pack("<4sH", b"PK\1\2", 20) + facts)
        index.write(struct.pack("<HHHII", 0, 0, 0, 0, body.tell()) + name)
        body.write(b"PK\3\4" + facts + name + data)
    index, start = index.getvalue(), body.tell()
    body.write(index + struct.pack("<4s4HIIH", b"PK\5\6", 0, 0, 2, 2, len(index), start, 0))
    path.write_bytes(body.getvalue())


def npy_bomb(path: Path, folder: Path) -> None:
    """An archive whose arrays say that they have 4 TiB."""
    header = npy_header(2**30, 2**10)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("features", "paths", "backbone"):
            archive.writestr(f"{name}.npy", header)


def npy_header(rows: int, columns: int) -> bytes:
    """:return: how a NumPy file of so many fp32 numbers begins."""
    words = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}".ljust(117) + "\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(words)) + words.encode()


def png_bomb(path: Path, folder: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = b"\x78\x9c" + zeros(SIDE * (SIDE + 1))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def tiff_bomb(path: Path, folder: Path) -> None:
    """A header of a picture of one deflated strip."""
    data = b"\x78\x9c" + zeros(SIDE * SIDE)
    tags = {256: SIDE, 257: SIDE, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: SIDE, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


def pipe(path: Path, folder: Path) -> None:
    """One that nobody writes to."""
    path.unlink()
    os.mkfifo(path)


def endless(path: Path, folder: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def entities(path: Path, folder: Path) -> None:
    """Ten to the ninth laughs."""
    lines = ['<?xml version="1.0"?>', '<!DOCTYPE a [<!ENTITY e0 "ha">']
    lines += [f'<!ENTITY e{k} "{10 * f"&e{k - 1};"}">' for k in range(1, 10)]
    path.write_text("\n".join([*lines, "]>", "<Annotations><Annotation Name='&e9;'>&e9;</Annotation></Annotations>"]))


def external_entity(path: Path, folder: Path) -> None:
    text = path.read_text(encoding="latin-1")
    declared = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
    path.write_text(declared + text.partition("?>")[2].replace("<Annotations", "<Annotations Note='&x;'", 1))


def huge_polygon(path: Path, folder: Path) -> None:
    corners = ((0, 0), (1e9, 0), (1e9, 1e9), (0, 1e9))
    points = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in corners)
    region = f"<Region Id='1'><Vertices>{points}</Vertices></Region>"
    path.write_text(f"<Annotations><Annotation><Regions>{region}</Regions></Annotation></Annotations>")


def deep_json(path: Path, folder: Path) -> None:
    path.write_text(100_000 * "[" + 100_000 * "]")


def huge_json(path: Path, folder: Path) -> None:
    """The file's own keys, with numbers and sides that no machine holds."""
    text = json.dumps(json.loads(path.read_text()))
    path.write_text("".join("9" + 400 * "9" if letter.isdigit() else letter for letter in text))


def odd_rows(path: Path, folder: Path) -> None:
    """A table whose fields are of another place, and longer than Python's reader takes."""
    header, *rows = path.read_text().splitlines()
    names = [f"{EVIL}{k}" for k in range(len(rows))]
    path.write_text("\n".join([header, *(f'{k},{names[k]},"{200_000 * "x"}"' for k in range(len(rows)))]))


CONTENTS: dict[str, Callable[[Path, Path], None]] = {
    "pickle": pickled,
    "torch pickle": torch_pickled,
    "npz pickle": npz_pickled,
    "zip bomb": zip_bomb,
    "npy bomb": npy_bomb,
    "png bomb": png_bomb,
    "tiff bomb": tiff_bomb,
    "entities": entities,
    "external entity": external_entity,
    "huge polygon": huge_polygon,
    "pipe": pipe,
    "device": endless,
    "deep json": deep_json,
    "huge json": huge_json,
    "odd rows": odd_rows,
}
ODD_NUMBERS = {"huge polygon", "huge json"}  # which may be taken for what they are, where that takes no memory

# ---- names and links ----


def rename_patch(name: str, toy: Path, folder: Path) -> None:
    """A patch and its masks are called otherwise."""
    for path in (toy / "data/MoNuSegTrainingData").glob("*/*A000*_000.*"):
        path.rename(path.with_stem(name))


def rename_slide(name: str, toy: Path, folder: Path) -> None:
    for path in (toy / "raw").rglob("*A000*"):
        path.rename(path.with_stem(name))


def say_slide(name: str, toy: Path, folder: Path) -> None:
    """slides.csv calls a slide otherwise."""
    images = sorted((toy / "raw").rglob("*.tif"))
    write_table(toy / "raw", [(path.name, name if "A000" in path.name else path.stem) for path in images])


def rename_sample(name: str, toy: Path, folder: Path) -> None:
    """The manifest calls a sample otherwise."""
    table = toy / "samples/manifest.csv"
    header, first, *rest = table.read_text().splitlines()
    fields = first.split(",")
    fields[1] = '"' + name.replace('"', '""') + '"'
    table.write_text("\n".join([header, ",".join(fields), *rest, ""]))


def rename_foreign(name: str, toy: Path, folder: Path) -> None:
    """The annotations call an image otherwise."""
    for path in (toy / "foreign/annotations").iterdir():
        content = json.loads(path.read_text())
        content["images"][0]["file_name"] = name
        path.write_text(json.dumps(content))


def replace_by_link(what: str, toy: Path, folder: Path) -> None:
    """A file or folder of the inputs is a link to a file or folder elsewhere."""
    path = next(toy.glob(what))
    target = Path("/etc") if path.is_dir() else Path("/etc/passwd")
    path.rename(folder / "before")
    path.symlink_to(target)


def link_round(toy: Path, folder: Path) -> None:
    """A folder of images holds a link to itself."""
    (toy / "data/MoNuSegTrainingData/images/round").symlink_to(".")
    (toy / "data/MoNuSegTrainingData/images/gone.png").symlink_to("nowhere")


NAMES = (EVIL, "a\nb", LONG, "/tmp/evil", "..", *ODD)
PLACES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    **{f"patch {name!r}": ("export", partial(rename_patch, name)) for name in ("a\nb", *ODD)},
    **{f"slide {name!r}": ("prepare", partial(rename_slide, name)) for name in ("a\nb", *ODD)},
    **{f"slide {name!r} of slides.csv": ("prepare", partial(say_slide, name)) for name in NAMES},
    **{f"sample {name!r}": ("assembly", partial(rename_sample, name)) for name in NAMES},
    **{f"foreign image {name!r}": ("import", partial(rename_foreign, name)) for name in NAMES},
    "image that links elsewhere": (
        "training",
        partial(replace_by_link, "data/MoNuSegTrainingData/images/*A000*_000.png"),
    ),
    "images that link elsewhere": ("training", partial(replace_by_link, "data/MoNuSegTrainingData/images")),
    "sample that links elsewhere": ("assembly", partial(replace_by_link, "samples/samples/*")),
    "samples that link elsewhere": ("assembly", partial(replace_by_link, "samples/samples")),
    "links that lead round": ("training", link_round),
}
