"""Images without masks: those that are held out or labelled are told by their content and their slides."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images, write_patches
from PIL import Image

from guided_diffusion import unlabelled
from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.image_datasets import load_dataset
from guided_diffusion.unlabelled import list_unlabelled

SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6, mark_unknown=True)
TRAIN, TEST = "MoNuSegTrainingData", "MoNuSegTestData"


@pytest.fixture
def other(tmp_path):
    return write_images(tmp_path / "other")


@pytest.fixture
def data(tmp_path):
    """Three training slides of four patches, of which one is held out, and a test slide."""
    write_patches(tmp_path / "data" / TRAIN, count=12)
    write_patches(tmp_path / "data" / TEST, count=4, first=100)
    return tmp_path / "data"


def load(data, folders, **options):
    named = dict(data_dir=str(data), dataset_mode="monuseg", image_size=32, spec=SPEC, unlabelled_dir=folders)
    return load_dataset(**{**named, "part": "train", "val_share": 0.1, **options})


def test_folders_in_their_order(data, other, tmp_path):
    write_images(tmp_path / "another", count=2, first=300)
    own = load(data, f"{tmp_path / 'another'},{other},{other}")
    assert [item.image for item in own.sources[8:10]] == sorted(map(str, (tmp_path / "another").iterdir()))
    assert (own.unlabelled, own.copies) == (10, 0)
    other.rename(tmp_path / "a,comma")
    assert load(data, str(tmp_path / "a,comma")).unlabelled == 8


def test_they_may_move_but_are_told_from_others(data, other, tmp_path):
    write_images(tmp_path / "another", count=2, first=300)
    before = load(data, f"{tmp_path / 'another'},{other}").identity()
    shutil.copytree(other, tmp_path / "far" / "away")
    assert load(data, f"{tmp_path / 'another'},{tmp_path / 'far/away'}").identity() == before
    write_images(other, count=1, first=301)
    changed = load(data, f"{tmp_path / 'another'},{other}").identity()
    assert changed[0] == before[0] and changed[1] != before[1] != load(data, str(other)).identity()[1]


def hidden_and_seen(data):
    """A held-out, a training and a test image."""
    held, seen = (load(data, "", part=part).items[0].image for part in ("held_out", "train"))
    return held, seen, str(data / TEST / "images" / "slide-25_000.png")


@pytest.mark.parametrize("slide", [False, True])
def test_what_is_hidden_is_refused(data, other, slide):
    """A copy under another name, or another picture of the slide; without held-out slides the test set alone counts."""
    held, _, test = hidden_and_seen(data)
    for hidden, options in ((held, {"part": ""}), (test, {"part": "", "is_train": False})):
        name = hidden.rpartition("/")[2].replace("000", "999") if slide else "innocent.png"
        if slide:
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(other / name)
        else:
            shutil.copy(hidden, other / name)
        message = rf"--unlabelled_dir: {other / name} is "
        with pytest.raises(ValueError, match=message + ("of slide" if slide else f"a copy of {hidden}")):
            load(data, str(other))
        shown = load(data, str(other), **options)
        assert (shown.unlabelled, shown.copies) == ((9, 0) if slide else (8, 1))
        (other / name).unlink()


def test_the_slide_is_what_slides_csv_says(data, other):
    """As the error advises, where a name is that of a hidden slide by chance."""
    write_images(other, count=1, first=400).joinpath("other-100_000.png").rename(other / "slide-25_999.png")
    with pytest.raises(ValueError, match=r"is of slide slide-25.*if it is of another slide, say so in a slides\.csv"):
        load(data, str(other))
    rows = [f"{path.name},foreign\n" for path in other.iterdir()]
    (other / "slides.csv").write_text("file,slide\n" + "".join(rows))
    assert load(data, str(other)).unlabelled == 9
    (other / "slides.csv").write_text("file,slide\n" + "".join(rows).replace("foreign", "slide-25", 1))
    with pytest.raises(ValueError, match="is of slide slide-25"):
        load(data, str(other))


def test_copies_of_labelled_images_are_left_out(data, other):
    _, seen, _ = hidden_and_seen(data)
    shutil.copy(seen, other / "copy.png")
    own = load(data, str(other))
    assert (own.unlabelled, own.copies) == (8, 1) and not any("copy" in item.image for item in own.sources)
    for path in other.glob("other*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds nothing but copies of labelled images"):
        load(data, str(other))


def test_hardly_anything_is_read_to_find_copies(data, other, monkeypatch):
    """Files of one size, as BMP has them: a block of each; and all of what is alike there, too."""
    monkeypatch.setattr(unlabelled, "_BLOCK", 64)
    looked = []
    for look in (unlabelled._middle, unlabelled._whole):
        monkeypatch.setattr(unlabelled, look.__name__, lambda path, look=look: looked.append(path) or look(path))
    items = load(data, "").items
    sizes = [
        {path: path.stat().st_size for path in paths} for paths in (other.iterdir(), [Path(i.image) for i in items])
    ]
    alike = set(sizes[0].values()) & set(sizes[1].values())
    assert list_unlabelled(str(other), items, [])[1] == 0
    assert sorted(looked) == sorted(str(path) for own in sizes for path in own if own[path] in alike)
    looked.clear()
    for folder in (other, data / TRAIN / "images"):
        for path in folder.iterdir():
            Image.open(path).save(path.with_suffix(".bmp"))
            path.unlink()
    items = load(data, "").items
    first = next(other.iterdir())
    almost = bytearray(Path(items[0].image).read_bytes())
    almost[-1] ^= 1
    first.write_bytes(almost)
    found, copies = list_unlabelled(str(other), items, [])
    assert (len(found), copies, len(looked)) == (8, 0, 16 + 2)


@pytest.mark.parametrize("mistake", ["missing", "empty", "small", "unreadable"])
def test_mistakes(data, other, tmp_path, mistake):
    folder, message = other, ""
    if mistake == "missing":
        folder, message = tmp_path / "nowhere", "--unlabelled_dir '.*nowhere' is not a folder"
    elif mistake == "empty":
        folder, message = tmp_path / "empty", "--unlabelled_dir .*empty holds no image"
        folder.mkdir()
    elif mistake == "small":
        write_images(other, count=1, size=31, first=400)
        message = "other-100_000.png is 31 x 31 px, smaller than --image_size 32"
    else:
        (other / "x.png").write_bytes(b"no image")
        message = "x.png is not an image that can be read"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(data, str(folder))
