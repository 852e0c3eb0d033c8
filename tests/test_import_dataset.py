"""import_dataset.py from end to end: what goes in comes out and can be cut, and what is wrong leaves no trace."""

import csv
import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import foreign_sets
import numpy as np
import pytest
import scipy.io
from foreign_sets import SIZE, WRITERS, save, save_mat, save_npy, scene
from PIL import Image

from guided_diffusion import cell_classes, cli
from guided_diffusion.images import list_items
from scripts import import_dataset, prepare_monuseg

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    import_dataset.main([*map(str, arguments), "--num_workers", "1"])


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refusal(capsys, *arguments):
    """Runs the program as the command line would; the one line it prints."""
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: run(*arguments))
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "\n".join(lines)
    return lines[-1]


def read(path):
    return np.asarray(Image.open(path))


def same_parts(one, other):
    """Whether two instance maps are equal but for their numbers."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    return pairs.shape[1] == len(np.unique(one)) == len(np.unique(other)) and ((one > 0) == (other > 0)).all()


def assert_imported(out, expected):
    """OUT holds what was expected, no more and no less."""
    with open(out / "slides.csv", newline="") as file:
        rows = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    assert {name: row["slide"] for name, row in rows.items()} == expected.slides
    assert {row["mpp"] for row in rows.values()} == {expected.mpp}
    assert [one.name for one in cell_classes.read_classes(out)] == expected.classes
    images = {path.stem: path for path in out.glob("*/images/*")}
    assert images.keys() == expected.scenes.keys()
    assert {name for name, path in images.items() if path.parts[-3] == "test"} == expected.test
    for name, wanted in expected.scenes.items():
        folder = images[name].parents[1]
        inst_map = read(folder / "inst_masks" / f"{name}.tif")
        assert np.array_equal(read(images[name]), wanted.image) and inst_map.dtype == np.int32
        assert np.array_equal(inst_map, wanted.inst_map) if expected.exact else same_parts(inst_map, wanted.inst_map)
        assert (folder / "class_masks").is_dir() == bool(expected.classes)
        if expected.classes:
            class_map = read(folder / "class_masks" / f"{name}.png")
            assert class_map.dtype == np.uint8 and np.array_equal(class_map, wanted.class_map)


@pytest.mark.parametrize("name", WRITERS)
def test_a_set_comes_out_as_it_went_in_and_can_be_cut(tmp_path, capsys, name):
    expected = WRITERS[name](tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path / 'src'}: {name}: ") and ", ".join(expected.classes) in said[0]
    nuclei = sum(len(np.unique(one.inst_map)) - 1 for n, one in expected.scenes.items() if n not in expected.test)
    count, slides = (len({f(n) for n in expected.scenes if n not in expected.test}) for f in (str, expected.slides.get))
    assert f"train: {count} images of {slides} slides, {nuclei} nuclei" in said[1]
    assert_imported(tmp_path / "out", expected)

    patches = tmp_path / "patches"
    prepare_monuseg.main([*map(str, (tmp_path / "out", patches, "--patch_size", 16, "--stride", 16)), "--workers", "1"])
    splits = (True, False) if expected.test else (True,)
    found = Counter(item.slide for train in splits for item in list_items(str(patches), "monuseg", train))
    assert found == Counter({s: 4 * n for s, n in Counter(expected.slides.values()).items()})
    assert cell_classes.read_classes(patches) == cell_classes.read_classes(tmp_path / "out")
    assert json.loads((patches / "prepare.json").read_text())["mpp"] == float(expected.mpp or 0.25)
    assert len(list(patches.rglob("class_masks/*.png"))) == (4 * len(expected.scenes) if expected.classes else 0)


@pytest.mark.parametrize("layout", ["flat", "hover-next"])
def test_other_packings_of_pannuke(tmp_path, layout):
    expected = foreign_sets.pannuke(tmp_path / "src", layout)
    run(tmp_path / "src", tmp_path / "out")
    assert_imported(tmp_path / "out", expected)


def test_one_fold_alone_is_for_training(tmp_path):
    expected = foreign_sets.pannuke(tmp_path / "src")
    run(tmp_path / "src" / "Fold 3", tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out").glob("train/images/*")} == expected.test


@pytest.mark.parametrize("annotator", ["second", "bioinformatician"])
def test_the_folder_in_a_folder_of_cryonuseg(tmp_path, annotator):
    expected = foreign_sets.cryonuseg(tmp_path / "src", annotator)
    run(tmp_path / "src", tmp_path / "out", "--annotator", annotator)
    assert_imported(tmp_path / "out", expected)


def test_packed_run_lengths_of_coco(tmp_path):
    pytest.importorskip("pycocotools")
    expected = foreign_sets.coco(tmp_path / "src", packed=True)
    run(tmp_path / "src", tmp_path / "out")
    assert_imported(tmp_path / "out", expected)


def test_ids_slides_and_colours_that_an_export_leaves_are_kept(tmp_path):
    expected = foreign_sets.coco(tmp_path / "src")
    path = tmp_path / "src/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for number, row in enumerate(content["annotations"]):
        row["instance"] = 1000 - number
    for row in content["images"]:
        row["slide"] = "P 1"
    content["categories"][0]["color"], content["categories"][1]["color"] = [1, 2, 3], [1, 2, 300]
    path.write_text(json.dumps(content))
    run(tmp_path / "src", tmp_path / "out")
    inst_map, wanted = read(tmp_path / "out/train/inst_masks/a.tif"), expected.scenes["a"].inst_map
    assert np.array_equal(inst_map, np.where(wanted > 0, 1001 - wanted, 0))
    assert "train/images/a.png,P-1," in (tmp_path / "out/slides.csv").read_text()
    assert [one.colour for one in cell_classes.read_classes(tmp_path / "out")] == [(1, 2, 3), (0, 158, 115)]


def test_processes_and_a_second_run_change_nothing(tmp_path):
    foreign_sets.conic(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out")
    before = snapshot(tmp_path / "out")
    import_dataset.main([str(tmp_path / "src"), str(tmp_path / "out"), "--num_workers", "2"])
    assert snapshot(tmp_path / "out") == before
    foreign_sets.tnbc(tmp_path / "other")
    run(tmp_path / "other", tmp_path / "out")  # another import replaces it whole
    assert not (tmp_path / "out" / "classes.json").exists()


def test_mpp_and_test_set_by_hand(tmp_path, capsys):
    expected = foreign_sets.tnbc(tmp_path / "src")
    assert "--test 9*: there is no such part or slide; there are 01, 02, tnbc-01" in refusal(
        capsys, tmp_path / "src", tmp_path / "out", "--test", "tnbc-01,9*"
    )
    run(tmp_path / "src", tmp_path / "out", "--mpp", 0.5, "--test", "*01")
    expected.mpp, expected.test = "0.5", {name for name in expected.scenes if "01_" in name}
    assert_imported(tmp_path / "out", expected)
    assert "nothing is left to train on" in refusal(capsys, tmp_path / "src", tmp_path / "no", "--test", "0?")


# ---- what is refused ----


def npy(name, change):
    """Damage to an array: a function of it, or a position and the value to put there."""

    def damage(root):
        array = np.load(root / name)
        if callable(change):
            array = change(array)
        else:
            array[change[0]] = change[1]
        np.save(root / name, array)

    return damage


def mat(name, **arrays):
    """Damage to variables of a .mat; those of None are left out."""

    def damage(root):
        content = {key: value for key, value in scipy.io.loadmat(root / name).items() if not key.startswith("__")}
        save_mat(root / name, **{key: value for key, value in {**content, **arrays}.items() if value is not None})

    return damage


def cut(name, count):
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-count])


def text(name, content):
    return lambda root: (root / name).write_text(content)


def gone(name):
    return lambda root: next(root.glob(name)).unlink()


def moved(name, to="elsewhere"):
    return lambda root: (root / name).rename(root / to)


def picture(name, pixels):
    return lambda root: save(root / name, pixels)


def table(change):
    """Damage to COCO's training annotations, by a function of what they hold."""

    def damage(root):
        path = root / "annotations/instances_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def note(**changes):
    """Damage to the first of COCO's training annotations."""
    return table(lambda content: content["annotations"][0].update(changes))


def counts(value):
    return note(segmentation={"size": [SIZE, SIZE], "counts": value})


def same_slide_twice(root):
    for path in sorted(root.rglob("TCGA-test_same.*")):
        path.rename(path.with_name(path.name.replace("test_same", "train")))


ONES = np.ones((SIZE, SIZE), np.uint8)
DOTS = (np.indices((SIZE, SIZE)) % 8 == 4).all(0).astype(np.uint8)
STRIPES = ((np.arange(SIZE) % 4 < 2) * ONES * 255).astype(np.uint8)
CLEAR = np.zeros((SIZE, SIZE, 4), np.uint8)
IMAGES, MASKS, TYPES = (
    f"Fold 1/{path}.npy" for path in ("images/fold1/images", "masks/fold1/masks", "images/fold1/types")
)
TILE = "CoNSeP/Train/Labels/train_1.mat"
REGION = "lizard_labels/Lizard_Labels/Labels/crag_2.mat"
INFO = "lizard_labels/Lizard_Labels/info.csv"
SLIDE, TRUTH = (f"TNBC_NucleiSegmentation/{name}_01/01_1.png" for name in ("Slide", "GT"))
ORGAN = "human bladder/label masks modify/human_bladder_01.tif"
# Format, damage, and what the line must say.
FLAWS = [
    ("pannuke", npy(MASKS, ((0, 0, slice(3), slice(2)), 9)), "patch 0: 3 px are of several nuclei; --allow overlaps"),
    ("pannuke", npy(MASKS, ((1, 2, 2, 0), 1.5)), "masks.npy, patch 1 holds numbers other than whole"),
    ("pannuke", npy(MASKS, ((1, 2, 2, 0), -1)), "patch 1 holds numbers other than"),
    ("pannuke", npy(MASKS, ((1, 2, 2, 0), np.nan)), "patch 1 holds numbers other than"),
    (
        "pannuke",
        npy(IMAGES, ((1, 2, 2, 0), 256)),
        "patch 1 holds numbers other than whole ones from 0 to 255",
    ),
    ("pannuke", cut(MASKS, 4000), "masks.npy is not a whole .npy"),
    ("pannuke", text(IMAGES, ""), "images.npy is not a whole .npy"),
    ("pannuke", text(IMAGES, "no array at all"), "images.npy is not a whole .npy (it does not begin as one)"),
    ("pannuke", lambda root: (root / IMAGES).write_bytes(pickle.dumps({})), "is not a whole .npy"),
    ("pannuke", lambda root: np.save(root / TYPES, np.array([{}], object)), "types.npy holds pickled objects"),
    ("pannuke", npy(MASKS, lambda array: array[:, 1:]), "expected (N, H, W, 3) and (N, H, W, 6)"),
    ("pannuke", npy(TYPES, lambda array: array[1:]), "not a name of a tissue for each of 3"),
    ("pannuke", gone(TYPES), "fold 1, which has no types.npy"),
    ("pannuke", gone(MASKS), "fold 1, which has no masks.npy"),
    ("pannuke", gone(IMAGES), "fold 1, which has no images.npy"),
    ("pannuke", lambda root: save_npy(root / "fold1/images.npy", np.zeros(3)), "are both of fold 1"),
    ("conic", npy("labels.npy", lambda array: array * [1, 7]), "which is not in classes.json"),
    ("conic", npy("labels.npy", lambda array: np.where([True, False], array > 0, array)), "a nucleus is of one class"),
    ("conic", npy("labels.npy", lambda array: array * [1, 0]), "has none: give it a class"),
    ("conic", npy("labels.npy", lambda array: array * 0), "has no nucleus in any image"),
    ("conic", gone("patch_info.csv"), "patch_info.csv is missing"),
    ("conic", text("patch_info.csv", f"x\n{200_000 * 'a'}-0\n"), "patch_info.csv is no table in UTF-8"),
    ("conic", text("patch_info.csv", "x\na-0\n"), "has 1 rows for 3 patches"),
    ("conic", text("patch_info.csv", "x\na-0\na-0\na-1\n"), "'a-0' is no name such as"),
    ("conic", text("patch_info.csv", f"x\na-0\na-1\na-{5000 * '9'}\n"), "9' is no name such as"),
    ("consep", cut(TILE, 60), "train_1.mat is not a whole .mat"),
    ("consep", mat(TILE, inst_map=None), "has no inst_map"),
    ("consep", mat(TILE, inst_map=ONES / 2), "inst_map holds numbers other than whole"),
    ("consep", mat(TILE, inst_map=np.array([[{"a": 1}]], object)), "inst_map holds object, not numbers"),
    ("consep", mat(TILE, inst_map=0 * ONES), "train_1.mat: no nucleus in the mask"),
    ("consep", mat(TILE, inst_map=ONES), "nucleus 1 has pixels of classes"),
    ("consep", mat(TILE, type_map=8 * ONES), "is of class 8, which is not in"),
    ("consep", mat(TILE, type_map=ONES[1:]), "they must be alike"),
    ("consep", picture("CoNSeP/Train/Images/train_1.png", ONES[1:]), "32 x 32 px, its image 32 x 31"),
    ("consep", gone(TILE), "train_1.png has no partner in"),
    ("consep", moved("CoNSeP/Test/Labels"), "Test/Images has no 'labels' beside it"),
    ("lizard", mat(REGION, **{"id": ONES[:1, :1], "class": ONES[:1, :1]}), "is in inst_map but not in id"),
    ("lizard", mat(REGION, **{"class": 7 * ONES[:4, :1]}), "is of class 7"),
    ("lizard", mat(REGION, **{"class": ONES[:1, :1]}), "has 1 classes for"),
    ("lizard", mat(REGION, **{"class": None}), "crag_2.mat lacks class"),
    ("lizard", gone("*/*/crag_2.png"), "there is no image crag_2.png"),
    ("lizard", gone(REGION), "there is no crag_2.mat in"),
    ("lizard", text(INFO, "Filename,Split\ncrag_2,4\n"), "of split '4'"),
    ("kumar", same_slide_twice, "would both be called TCGA-train"),
    ("tnbc", picture(SLIDE, CLEAR), "partly transparent"),
    ("tnbc", picture(TRUTH, 0 * ONES), "GT_01/01_1.png: no nucleus in the mask; remove the image, or --allow empty"),
    ("tnbc", moved("TNBC_NucleiSegmentation/GT_02"), "Slide_02 and GT_02 go together"),
    ("nuinsseg", gone(ORGAN), "human_bladder_01.png has no partner"),
    ("nuinsseg", picture(ORGAN, np.eye(8, dtype=np.uint16)), "8 x 8 px, its image 32 x 32"),
    ("nuinsseg", moved("mouse liver/label masks modify"), "has no 'label masks modify' beside it"),
    (
        "cryonuseg",
        moved("Annotator 1 (biologist)/label masks modify"),
        "0 'label masks modify' of --annotator biologist",
    ),
    ("cellpose", gone("train/a_masks.png"), "a_img.png has no partner"),
    ("cellpose", gone("train/a_img.png"), "a_masks.png has no partner"),
    ("cellpose", picture("train/a.png", ONES), "would both belong to a_masks"),
    ("cellpose", picture("train/a_masks.png", STRIPES), "several nuclei, all with the number 255"),
    (
        "cellpose",
        picture("train/a_masks.png", DOTS),
        "several nuclei, all with the number 1",
    ),
    ("stardist", cut("train/masks/a.tif", 1000), "a.tif cannot be decoded"),
    ("stardist", picture("train/masks/a.tif", ONES.astype(np.float32)), "holds floating-point"),
    ("coco", cut("annotations/instances_train2017.json", 60), "instances_train2017.json is not a whole JSON file"),
    ("coco", table(lambda t: t.update(images=3)), "are not lists of objects"),
    ("coco", table(lambda t: t["annotations"].append({**t["annotations"][0], "id": 9})), "px are of several nuclei"),
    ("coco", table(lambda t: t["categories"].append({"id": 1, "name": "x"})), "or two names"),
    ("coco", table(lambda t: t["images"][0].update(file_name="../../x.png")), "must be a path below the data set"),
    ("coco", table(lambda t: t["images"][0].update(file_name="/etc/x.png")), "must be a path below the data set"),
    ("coco", note(category_id=7), "is of category 7, which is none"),
    ("coco", note(category_id=[7]), "category_id [7] is neither a number nor a text"),
    ("coco", note(instance=2), "instance 2 is no id, or is there twice"),
    ("coco", note(instance=-1), "instance -1 is no id"),
    ("coco", table(lambda t: t["images"][0].update(id=1)), "two images have one id"),
    (
        "coco",
        table(lambda t: t["categories"].append({"id": 2, "name": "=1+1"})),
        "class 3 has no name that",
    ),
    ("coco", note(iscrowd=1), "is a crowd"),
    ("coco", note(image_id=77), "is of image 77, which is not there"),
    ("coco", note(segmentation=[]), "a box alone says no outline"),
    ("coco", note(segmentation=[[1, 2, 3, 4]]), "three points or more"),
    ("coco", note(segmentation=[[1, 2, 3, 4, 5, "x"]]), "three points or more"),
    ("coco", counts([3, 4]), "run lengths are not those of 32 x 32"),
    ("coco", counts([-1, SIZE**2 + 1]), "run lengths are not those"),
    ("coco", counts("0"), "run lengths are not those"),
    ("coco", counts("P"), "run lengths break off"),
    ("coco", counts("\x7f"), "is no part of run lengths"),
    ("coco", counts([SIZE**2]), "covers no pixel"),
    ("coco", gone("train2017/a.png"), "'a.png': there is no such image"),
    ("coco", picture("train2017/a.png", ONES[1:]), "its image is [31, 32] px"),
    ("coco", picture("val_test/a.png", ONES), "2 images are called so"),
]


@pytest.mark.parametrize(("name", "damage", "what"), FLAWS)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, name, damage, what):
    WRITERS[name](tmp_path / "src")
    damage(tmp_path / "src")
    before = snapshot(tmp_path)
    line = refusal(capsys, tmp_path / "src", tmp_path / "out", "--format", name)
    assert line.startswith("error: ") and what in line, line
    assert snapshot(tmp_path) == before


def test_a_nucleus_that_the_border_cuts_in_two_is_one(tmp_path):
    foreign_sets.cellpose(tmp_path / "src")
    cut_in_two = np.zeros((SIZE, SIZE), np.uint8)
    cut_in_two[2:6, 0], cut_in_two[9:12, 0] = 7, 7
    picture("train/a_masks.png", cut_in_two)(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out", "--format", "cellpose")
    assert np.array_equal(read(tmp_path / "out/train/inst_masks/a.tif") > 0, cut_in_two > 0)


def test_what_is_allowed_by_hand(tmp_path, capsys):
    foreign_sets.pannuke(tmp_path / "src")
    npy(MASKS, ((0, 0, slice(3), slice(2)), 9))(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "out", "--allow", "overlaps")
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("2 images without a nucleus; 3 px that were of several nuclei")
    assert read(tmp_path / "out/train/class_masks/fold1-Breast_0000.png")[0, :3].min() >= 2  # the later channel's
    foreign_sets.tnbc(tmp_path / "more")
    picture(TRUTH, 0 * ONES)(tmp_path / "more")
    run(tmp_path / "more", tmp_path / "out", "--allow", "overlaps,empty")
    assert capsys.readouterr().out.splitlines()[-1].endswith("; 1 images without a nucleus")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--format", "pascal"), "unknown --format pascal: choose one of auto, pannuke"),
        (("--format", "lizard"), "does not look like lizard: expected info.csv"),
        (("--mpp", 0), "--mpp is 0"),
        (("--allow", "all"), "--allow all: choose of overlaps, empty"),
        (("--num_workers", 0), "--num_workers 0"),
        (("--annotator", "biologist"), "--annotator biologist is for cryonuseg; this is tnbc"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, what):
    foreign_sets.tnbc(tmp_path / "src")
    with pytest.raises(SystemExit):
        cli.run(lambda: import_dataset.main([str(tmp_path / "src"), str(tmp_path / "out"), *map(str, flags)]))
    assert what in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_bad_folders(tmp_path, capsys):
    foreign_sets.tnbc(tmp_path / "src")
    foreign_sets.kumar(tmp_path / "src" / "more")
    before = snapshot(tmp_path)
    assert "looks like kumar and tnbc: say which by --format" in refusal(capsys, tmp_path / "src", tmp_path / "out")
    assert "is not a folder" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "lies in the input" in refusal(capsys, tmp_path / "src", tmp_path / "src" / "out")
    assert "would replace the input" in refusal(capsys, tmp_path / "src" / "more", tmp_path / "src")
    assert snapshot(tmp_path) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert "holds what is not of this program" in refusal(capsys, tmp_path / "src/more", tmp_path / "full")
    assert "looks like none of pannuke" in refusal(capsys, tmp_path / "full", tmp_path / "out")


def test_pickled_formats_are_refused_with_what_to_export_instead(tmp_path, capsys):
    one = scene(0)
    save(tmp_path / "cellpose/a.png", one.image)
    np.save(tmp_path / "cellpose/a_seg.npy", {"masks": one.inst_map}, allow_pickle=True)
    for flags in ((), ("--format", "cellpose")):
        line = refusal(capsys, tmp_path / "cellpose", tmp_path / "out", *flags)
        assert "_seg.npy, pickled objects" in line and "--save_tif" in line
    save(tmp_path / "cellvit/fold0/images/0_1.png", one.image)
    (tmp_path / "cellvit/fold0/labels").mkdir()
    np.save(tmp_path / "cellvit/fold0/labels/0_1.npy", {"inst_map": one.inst_map}, allow_pickle=True)
    assert "CellViT's labels, pickled objects" in refusal(capsys, tmp_path / "cellvit", tmp_path / "out")


def test_the_command_line(tmp_path):
    foreign_sets.conic(tmp_path / "src")
    command = [sys.executable, ROOT / "scripts" / "import_dataset.py", "src", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        "src: conic: CoNIC: 3 patches of 2 images; 0.5 um a pixel; "
        "classes neutrophil, epithelial, lymphocyte, plasma, eosinophil, connective",
        done.stdout.splitlines()[1],
    ]
    assert re.fullmatch(r"out: train: 3 images of 2 slides, \d+ nuclei", done.stdout.splitlines()[1])
    assert json.loads((tmp_path / "out/import.json").read_text()) == {
        "format": "conic",
        "mpp": 0.5,
        "test": [],
        "allow": [],
    }
