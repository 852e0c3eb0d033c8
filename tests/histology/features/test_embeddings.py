"""Feature files: what is found, that a killed extraction goes on, how rows are matched, and every refusal."""

import zipfile

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.histology.features import embeddings
from guided_diffusion.histology.features.backbones import load_backbone
from guided_diffusion.histology.features.embeddings import (
    Features,
    data_root,
    extract,
    find_images,
    load_features,
    save_features,
)


def draw(path, seed=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


class Counting:
    """The mean colour, and how many images have been seen."""

    name, weight_hash = "counting", "0" * 16

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = 0, stop_at

    def embed(self, images):
        if self.stop_at is not None and self.seen >= self.stop_at:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.mean((1, 2)).astype(np.float32)


@pytest.fixture
def made():
    return Features(
        np.eye(3, 4, dtype=np.float32),
        ["a/x_000.png", "b/x_000.png", "b/y_001.png"],
        ["x_000"] * 2 + ["y_001"],
        "stain",
        "none",
    )


def names(found, root):
    return [path.relative_to(root).as_posix() for path in found]


def test_finds_images_in_every_kind_of_folder(tmp_path):
    for split in ("MoNuSegTrainingData", "MoNuSegTestData"):
        draw(tmp_path / "data" / split / "images" / "a_000.png")
        draw(tmp_path / "data" / split / "bin_masks" / "a_000.png")
    for run in ("m_s1.0", "m_s1.5", ".kept.77.part"):  # the last one of a run that was killed
        draw(tmp_path / "sweep" / run / "samples" / "b.png")
        draw(tmp_path / "sweep" / run / "images" / "b.png")
        (tmp_path / "sweep" / run / "inst_masks").mkdir()  # the reference's runs have no manifest
    draw(tmp_path / "plain" / "c.jpg")
    (tmp_path / "plain" / "notes.txt").write_text("")
    (tmp_path / "plain" / ".hidden.png").write_text("")
    assert names(find_images([tmp_path / "data"]), tmp_path) == [
        "data/MoNuSegTestData/images/a_000.png",
        "data/MoNuSegTrainingData/images/a_000.png",
    ]
    assert names(find_images([tmp_path / "data" / "MoNuSegTestData"]), tmp_path) == [
        "data/MoNuSegTestData/images/a_000.png"
    ]
    assert names(find_images([tmp_path / "sweep" / "m_s1.5"]), tmp_path) == ["sweep/m_s1.5/samples/b.png"]
    assert names(find_images([tmp_path / "sweep"]), tmp_path) == [
        "sweep/m_s1.0/samples/b.png",
        "sweep/m_s1.5/samples/b.png",
    ]
    both = find_images([tmp_path / "sweep", tmp_path / "plain", tmp_path / "plain"])
    assert names(both, tmp_path)[0] == "plain/c.jpg" and len(both) == 3


def test_refuses_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        find_images([tmp_path / "none"])
    with pytest.raises(ValueError, match="holds no image"):
        find_images([tmp_path])


def test_root_is_the_nearest_folder_with_a_split(tmp_path):
    file = draw(tmp_path / "data" / "MoNuSegTestData" / "images" / "a_000.png")
    other = draw(tmp_path / "data" / "out" / "c.png")
    assert data_root([file]) == data_root([file, other]) == data_root([other]) == tmp_path / "data"
    assert data_root([draw(tmp_path / "plain" / "c.png")]) == tmp_path / "plain"
    assert data_root([file], tmp_path) == tmp_path
    with pytest.raises(ValueError, match="--root .* does not hold .*a_000.png"):
        data_root([file], tmp_path / "plain")


def test_extract_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 4)
    files = [draw(tmp_path / f"{i}.png", i, (16, 16) if i % 5 else (8, 12)) for i in range(10)]
    digests = [embeddings.digest(file) for file in files]
    whole = extract(files, digests, Counting(), tmp_path / "one", batch_size=3)
    assert np.allclose(whole, [embeddings.read_image(file).mean((0, 1)) for file in files])
    with pytest.raises(KeyboardInterrupt):
        extract(files, digests, Counting(stop_at=6), tmp_path / "two", batch_size=3, num_workers=0)
    again, done = Counting(), []
    resumed = extract(files, digests, again, tmp_path / "two", batch_size=3, progress=done.append)
    assert np.array_equal(resumed, whole) and again.seen == 6 and sum(done) == 10


def test_chunks_of_other_images_weights_or_precision_are_not_taken(tmp_path):
    file = draw(tmp_path / "a.png", 0)
    digest = embeddings.digest(file)

    def seen(digest, key="fp32", weight_hash="0"):
        backbone = Counting()
        backbone.weight_hash = weight_hash
        extract([file], [digest], backbone, tmp_path / "parts", key=key)
        return backbone.seen

    assert [seen(digest), seen(digest), seen(digest, "bf16"), seen(digest, weight_hash="1")] == [1, 0, 1, 1]
    assert seen(embeddings.digest(draw(file, 1))) == 1
    for part in (tmp_path / "parts").iterdir():
        part.write_bytes(b"cut")
    assert seen(digest) == 1


def test_extract_is_independent_of_batch_size_and_order(tmp_path):
    backbone = load_backbone("efficientnet_lite0", th.device("cpu"))
    files = [draw(tmp_path / f"{i}.png", i) for i in range(7)]
    digests = [embeddings.digest(file) for file in files]
    one = extract(files, digests, backbone, tmp_path / "one", batch_size=1)
    many = extract(files[::-1], digests[::-1], backbone, tmp_path / "many", batch_size=4)
    assert np.abs(one - many[::-1]).max() < 1e-5


def test_not_finite_names_the_image(tmp_path):
    class Broken(Counting):
        def embed(self, images):
            return np.full((len(images), 2), np.nan, np.float32)

    file = draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png are not finite"):
        extract([file], [embeddings.digest(file)], Broken(), tmp_path / "parts")


def test_digest_refuses_what_cannot_be_read(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match="link.png is gone, or a link that leads nowhere"):
        embeddings.digest(tmp_path / "link.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png is not an image"):
        embeddings.digest(tmp_path / "text.png")
    cut = draw(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(ValueError, match="cut.png cannot be decoded"):
        embeddings.digest(cut)


def test_file_keeps_everything(tmp_path, made):
    save_features(tmp_path / "f.npz", made)
    back = load_features(tmp_path / "f.npz")
    assert np.array_equal(back.features, made.features) and back.features.dtype == np.float32
    assert (back.paths, back.stems, back.backbone, back.weight_hash) == (made.paths, made.stems, "stain", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_rows_are_found_by_path_link_or_stem(tmp_path, made):
    assert np.array_equal(made.of(["/any/root/b/x_000.png", "/root/a/x_000.png"]), made.features[[1, 0]])
    target = draw(tmp_path / "a" / "x_000.png")
    link = tmp_path / "cluster" / "images" / "x_000.png"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../a/x_000.png")
    assert target.exists() and np.array_equal(made.of([link]), made.features[[0]])
    assert np.array_equal(made.of(["/elsewhere/y_001.png"]), made.features[[2]])
    with pytest.raises(ValueError, match="no row for /elsewhere/z.png"):
        made.of(["/r/a/x_000.png", "/elsewhere/z.png"])
    with pytest.raises(ValueError, match="2 rows for /elsewhere/x_000.png"):
        made.of(["/elsewhere/x_000.png"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(features=np.zeros((3, 4))), "float64, not float32"),
        (dict(features=np.array([[1, 2], [np.inf, 0], [0, 0]], np.float32)), "b/x_000.png are not finite"),
        (dict(paths=np.array(["a", "a", "b"])), "lacks a path or stem"),
        (dict(paths=np.array(["a", "b"])), "lacks a path or stem"),
        (dict(paths=np.array(["a", "b", "../c"])), "leads out of"),
        (dict(paths=np.array(["a", "b", "/c"])), "leads out of"),
        (dict(paths=np.arange(3)), "names that are not text"),
        (dict(stems=np.array(["a", {}, 1], dtype=object)), "no whole feature file"),
    ],
)
def test_load_refuses_bad_arrays(tmp_path, made, change, message):
    arrays = {name: np.array(getattr(made, name)) for name in embeddings.ARRAYS}
    np.savez(tmp_path / "f.npz", **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        load_features(tmp_path / "f.npz")


def test_load_refuses_what_would_fill_the_memory(tmp_path, made):
    """An archive that unpacks to a thousand times its size, and one whose header asks for 4 TiB."""
    arrays = {name: np.array(getattr(made, name)) for name in embeddings.ARRAYS}
    np.savez_compressed(tmp_path / "f.npz", **{**arrays, "features": np.zeros((3, 2**20), np.float32)})
    with pytest.raises(ValueError, match="no whole feature file"):
        load_features(tmp_path / "f.npz")
    np.savez(tmp_path / "f.npz", **arrays)
    header = b"\x93NUMPY\1\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (1073741824, 1024), }"
    with zipfile.ZipFile(tmp_path / "f.npz", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("features.npy", header.ljust(127) + b"\n")
    with pytest.raises(ValueError, match="no whole feature file"):
        load_features(tmp_path / "f.npz")


def test_load_refuses_what_is_no_feature_file(tmp_path, made):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_features(tmp_path / "f.npz")
    np.savez(tmp_path / "f.npz", features=made.features)
    with pytest.raises(ValueError, match="no whole feature file"):
        load_features(tmp_path / "f.npz")
    save_features(tmp_path / "f.npz", made)
    (tmp_path / "f.npz").write_bytes((tmp_path / "f.npz").read_bytes()[:-50])
    with pytest.raises(ValueError, match="no whole feature file"):
        load_features(tmp_path / "f.npz")


def test_same_slide_share_equals_brute_force():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    slides = rng.integers(0, 4, 60).astype(str)
    hits = 0
    for i in range(60):
        far = ((x - x[i]) ** 2).sum(1)
        far[i] = np.inf
        hits += slides[far.argmin()] == slides[i]
    assert embeddings.same_slide_share(x, slides) == pytest.approx(hits / 60)
