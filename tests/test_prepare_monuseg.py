"""prepare_monuseg.py from end to end: what it writes, what it refuses and that refusing leaves no trace."""

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import measure

from guided_diffusion import cell_classes, cli
from guided_diffusion.histology.slides import annotations, patches, toy
from guided_diffusion.images import list_items

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "prepare_monuseg.py"
MONUSEG = ROOT / ".." / "shared" / "data" / "monuseg"
sys.path.insert(0, str(SCRIPT.parent))
prepare_monuseg = importlib.import_module("prepare_monuseg")

SQUARE = '<A><Region><Vertex X="3" Y="3"/><Vertex X="8" Y="3"/><Vertex X="8" Y="8"/><Vertex X="3" Y="8"/></Region></A>'
TRAIN, TEST = "MoNuSegTrainingData", "MoNuSegTestData"


def prepare(*arguments):
    prepare_monuseg.main([*map(str, arguments), "--num_workers", "1"])


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def raw(tmp_path):
    """Two training slides (one of XML, one of a mask) and a test slide, 40 x 40 px."""
    rng = np.random.default_rng(0)
    root = tmp_path / "raw"
    images, outlines = (
        root / "MoNuSeg 2018 Training Data/Tissue Images",
        root / "MoNuSeg 2018 Training Data/Annotations",
    )
    more, test = root / "more/MoNuSegTrainingData", root / "MoNuSegTestData"
    for folder in (images, outlines, more / "images", more / "inst_masks", test):
        folder.mkdir(parents=True)
    for path in (images / "a.tif", more / "images/b.tif", test / "t.tif"):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    for path in (outlines / "a.xml", test / "t.xml"):
        path.write_text(SQUARE.replace("<A>", '<A MicronsPerPixel="0.2456">'))
    Image.fromarray(rng.integers(0, 60_000, (40, 40), dtype=np.uint16)).save(more / "inst_masks/b.tif")
    return root


SIZE = ("--patch_size", 16, "--stride", 16)


def test_patches_hold_the_pixels_of_their_slide(raw, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(raw, out, *SIZE)
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 slides do not say their micrometres a pixel: 0.25 (40x) is assumed; "
        "--slide_mpp NAME=0.5 says otherwise",
        f"{out}: {TRAIN}: 2 slides, 18 patches; {TEST}: 1 slides, 9 patches",
    ]
    slides = annotations.find_slides(raw)
    assert len(list(out.rglob("*.png"))) == 2 * 27 and len(list(out.rglob("*.tif"))) == 27
    for slide in slides:
        image, inst_map = annotations.read_slide(slide)
        for index, (row, column) in enumerate(patches.window_positions(40, 40, 16, 16)):
            cut = slice(row, row + 16), slice(column, column + 16)
            files = patches.patch_files(out / slide.split, slide.stem, index)
            arrays = {name: np.asarray(Image.open(path)) for name, path in files.items()}
            assert np.array_equal(arrays["images"], image[cut])
            assert arrays["inst_masks"].dtype == np.int32 and np.array_equal(arrays["inst_masks"], inst_map[cut])
            assert np.array_equal(arrays["bin_masks"], np.where(inst_map[cut] > 0, 255, 0))
    assert not list(out.rglob("*.part"))
    manifest = json.loads((out / "prepare.json").read_text())
    assert manifest["patches"] == {TRAIN: {"a": 9, "b": 9}, TEST: {"t": 9}} and manifest["complete"]


def test_modes_and_sizes(raw, tmp_path):
    prepare(raw, tmp_path / "m", "--patch_size", 24, "--stride", 12, "--mode", "mirror", "--resize", 8)
    count = patches.patch_count(40, 40, 24, 12, "mirror")
    files = sorted((tmp_path / "m" / TRAIN / "images").iterdir())
    assert len(files) == 2 * count
    assert Image.open(files[0]).size == (8, 8)
    assert mpp_of(tmp_path / "m") == 0.75


def mpp_of(out):
    return json.loads((out / "prepare.json").read_text())["mpp"]


def test_slides_of_several_magnifications_are_brought_to_one(raw, tmp_path, capsys):
    prepare(raw, tmp_path / "apart", *SIZE, "--slide_mpp", "b*=0.49")
    assert capsys.readouterr().out.splitlines()[0] == (
        "slides have 0.25, 0.5 um a pixel: areas go by 0.25, as most have; --mpp 0.5 would bring all to one"
    )
    assert mpp_of(tmp_path / "apart") == 0.25
    prepare(raw, tmp_path / "one", *SIZE, "--slide_mpp", "b*=0.49", "--mpp", 0.5, "--resize", 8)
    assert len(capsys.readouterr().out.splitlines()) == 1
    manifest = json.loads((tmp_path / "one" / "prepare.json").read_text())
    assert manifest["mpp"] == 1 and manifest["slides_mpp"] == {"a": 0.2456, "b": 0.49, "t": 0.2456}
    assert manifest["patches"] == {TRAIN: {"a": 4, "b": 9}, TEST: {"t": 4}}
    prepare(raw, tmp_path / "half", *SIZE, "--slide_mpp", "b*=0.49", "--mpp", 0.5)
    image, inst_map = annotations.read_slide(annotations.find_slides(raw)[0])
    read = [
        np.asarray(Image.open(tmp_path / "half" / TRAIN / name))
        for name in ("images/a_000.png", "inst_masks/a_000.tif")
    ]
    assert np.array_equal(
        read[0], np.asarray(Image.fromarray(image).resize((20, 20), Image.Resampling.BICUBIC))[:16, :16]
    )
    assert np.array_equal(read[1], inst_map[1::2, 1::2][:16, :16])


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--slide_mpp", "c=0.5"), "no slide is named c"),
        (("--slide_mpp", "a"), "'' is no number"),
        (("--slide_mpp", "a=0"), "'0' is no number"),
        (("--mpp", "0"), "--mpp is 0"),
    ],
)
def test_magnifications_that_are_none(raw, tmp_path, capsys, flags, what):
    assert what in refusal(capsys, raw, tmp_path / "out", *SIZE, *flags)


@pytest.mark.parametrize("resize", [None, 11])
def test_an_id_of_a_mirrored_patch_stands_for_one_part(raw, tmp_path, resize):
    prepare(
        raw,
        tmp_path / "m",
        "--patch_size",
        16,
        "--stride",
        8,
        "--mode",
        "mirror",
        *(["--resize", resize] if resize else []),
    )
    maps = [np.asarray(Image.open(path)) for path in (tmp_path / "m").rglob("inst_masks/[at]*.tif")]
    parts = [measure.label(inst_map, connectivity=1).max() for inst_map in maps]
    assert parts == [len(np.unique(inst_map[inst_map > 0])) for inst_map in maps] and max(parts) > 1


def test_a_second_run_writes_the_same_bytes_and_leaves_other_files_alone(raw, tmp_path):
    out = tmp_path / "out"
    (out / TRAIN / "images").mkdir(parents=True)
    (out / TRAIN / "images" / "mine.png").write_bytes(b"keep")
    (out / "notes.txt").write_text("keep")
    prepare(raw, out, *SIZE)
    first = snapshot(out)
    prepare(raw, out, *SIZE)
    assert snapshot(out) == first
    assert first["notes.txt"] == first[f"{TRAIN}/images/mine.png"] == b"keep"


def test_an_interrupted_run_is_finished_by_the_next(raw, tmp_path):
    out = tmp_path / "out"
    prepare(raw, out, *SIZE)
    whole = snapshot(out)
    for path in list((out / TEST).rglob("*_00*.*"))[:5]:
        path.unlink()
    manifest = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps(manifest | {"complete": False}))
    prepare(raw, out, *SIZE)
    assert snapshot(out) == whole


def test_processes_change_nothing(raw, tmp_path):
    prepare(raw, tmp_path / "one", *SIZE)
    prepare_monuseg.main([*map(str, (raw, tmp_path / "two", *SIZE)), "--num_workers", "2"])
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")


def test_out_below_raw_is_not_taken_for_raw(raw):
    prepare(raw, raw / "p16", *SIZE)
    first = snapshot(raw / "p16")
    prepare(raw, raw / "p16", *SIZE)
    assert snapshot(raw / "p16") == first
    prepare(raw, raw / "p20", "--patch_size", 20)
    assert len(list((raw / "p20" / TRAIN / "images").iterdir())) == 8


def test_no_test_slides_make_no_test_folder(raw, tmp_path):
    prepare(raw / "more", tmp_path / "out", *SIZE)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [TRAIN, "prepare.json"]


def test_toy_slides_are_prepared_like_real_ones(tmp_path):
    toy.write_toy_monuseg(tmp_path / "raw", train=2, test=1, size=96)
    prepare(tmp_path / "raw", tmp_path / "out", "--patch_size", 64, "--stride", 64)
    mask = np.asarray(Image.open(tmp_path / "out" / TRAIN / "inst_masks" / "TCGA-TOY-A000-01Z-00-DX1_003.tif"))
    assert np.array_equal(mask, toy.draw_slide([0, 0, 0], 96, 0).inst_map[32:, 32:])


@pytest.fixture
def classed(tmp_path):
    """Three training images of two patients and a test image, 40 x 40 px, of two classes; one nucleus is tiny."""
    root, rng = tmp_path / "classed", np.random.default_rng(0)
    inst_map = np.zeros((40, 40), np.int32)
    inst_map[2:20, 2:20], inst_map[22:38, 5:30], inst_map[21, 0] = 7, 90_000, 8
    of_nucleus = {7: 1, 8: 2, 90_000: 2}
    for name in ("train/A_001", "train/A_002", "train/B_001", "test/C_001"):
        split, stem = name.split("/")
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        class_map = cell_classes.painted(inst_map, of_nucleus)
        for folder, array in (("images", pixels), ("class_masks", class_map), ("inst_masks", inst_map)):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
            save_mask(root / split / folder / f"{stem}.{'tif' if folder == 'inst_masks' else 'png'}", array)
    cell_classes.write_classes(root, cell_classes.named(["round", "long"]))
    rows = [f"{stem}.png,{stem[0]},0.25" for stem in ("A_001", "A_002", "B_001", "C_001")]
    (root / "slides.csv").write_text("\n".join(["file,slide,mpp", *rows]) + "\n")
    return root


@pytest.mark.parametrize("flags", [(), ("--mode", "mirror", "--stride", 8), ("--mpp", 0.5), ("--resize", 8)])
def test_classes_are_cut_with_their_nuclei(classed, tmp_path, flags):
    prepare(classed, tmp_path / "out", *SIZE, *flags)
    out = tmp_path / "out"
    assert cell_classes.read_classes(out / TRAIN) == cell_classes.read_classes(classed)
    masks = sorted(out.rglob("class_masks/*.png"))
    assert len(masks) == len(list(out.rglob("inst_masks/*.tif"))) > 0
    for path in masks:
        class_map = np.asarray(Image.open(path))
        inst_map = np.asarray(Image.open(path.parents[1] / "inst_masks" / f"{path.stem}.tif"))
        of_nucleus = cell_classes.of_nuclei(
            inst_map, class_map, cell_classes.ids_of(cell_classes.read_classes(out)), ""
        )
        # A nucleus and its mirror image have numbers of their own.
        assert "mirror" in flags or {7: 1, 8: 2, 90_000: 2}.items() >= of_nucleus.items()
    assert {2, 1, 0} == {int(v) for path in masks for v in np.unique(np.asarray(Image.open(path)))}
    before = snapshot(out)
    prepare(classed, out, *SIZE, *flags)
    assert snapshot(out) == before


def test_patches_are_named_after_the_patient(classed, tmp_path):
    prepare(classed, tmp_path / "out", *SIZE)
    manifest = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert manifest["patches"] == {TRAIN: {"A": 18, "B": 9}, TEST: {"C": 9}}
    assert manifest["slides_mpp"]["A_002"] == 0.25
    slides = annotations.find_slides(classed)
    for slide, first in zip(slides, (0, 9, 0, 0)):
        image, _ = annotations.read_slide(slide)
        files = patches.patch_files(tmp_path / "out" / slide.split, slide.name, first)
        assert np.array_equal(np.asarray(Image.open(files["images"])), image[:16, :16])
    items = list_items(str(tmp_path / "out"), "monuseg")
    assert Counter(item.slide for item in items) == {"A": 18, "B": 9}


def test_nuclei_that_resampling_loses_are_counted(classed, tmp_path, capsys):
    prepare(classed, tmp_path / "out", *SIZE, "--mpp", 0.5)
    assert "WARNING: --mpp loses 4 of 12 nuclei, which are too small at that size" in capsys.readouterr().err
    prepare(classed, tmp_path / "same", *SIZE, "--mpp", 0.25)
    assert "WARNING" not in capsys.readouterr().err


CLASS_FLAWS = {
    "no table": (lambda r: (r / "classes.json").unlink(), "lacks the classes.json"),
    "a class outside the table": (lambda r: cell_classes.write_classes(r, cell_classes.named(["a"])), "not in classes"),
    "two classes in a nucleus": (lambda r: spoil(r, (3, 3), 2), "A_002.png: nucleus 7 has pixels of classes 1, 2"),
    "a class outside nuclei": (lambda r: spoil(r, (0, 0), 2), "A_002.png: 1 px outside nuclei"),
    "a nucleus without class": (lambda r: spoil(r, (21, 0), 0), "A_002.png: nucleus 8 has none"),
    "a mask of another size": (
        lambda r: save_mask(r / "train/class_masks/A_002.png", np.zeros((4, 4), np.uint8)),
        "A_002.png is 4 x 4 px",
    ),
    "a mask that is missing": (lambda r: (r / "train/class_masks/A_002.png").unlink(), "no file of class_masks"),
}


def spoil(root, pixel, value):
    path = root / "train/class_masks/A_002.png"
    class_map = np.array(Image.open(path))
    class_map[pixel] = value
    save_mask(path, class_map)


@pytest.mark.parametrize("flaw", CLASS_FLAWS)
def test_bad_classes_are_one_line_and_nothing_is_written(classed, tmp_path, capsys, flaw):
    damage, what = CLASS_FLAWS[flaw]
    damage(classed)
    assert what in refusal(capsys, classed, tmp_path / "out", *SIZE)
    assert not (tmp_path / "out").exists()


def test_sets_of_other_classes_are_not_mixed(classed, tmp_path, capsys):
    prepare(classed, tmp_path / "out", *SIZE)
    cell_classes.write_classes(classed, cell_classes.named(["square", "long"]))
    capsys.readouterr()
    assert "other classes of cells" in refusal(capsys, classed, tmp_path / "out", *SIZE)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def save_mask(path, values):
    Image.fromarray(values).save(path)


XML = "MoNuSeg 2018 Training Data/Annotations/a.xml"
IMAGE = "MoNuSegTestData/t.tif"
MASK = "more/MoNuSegTrainingData/inst_masks/b.tif"
FLAWS = {
    "image without annotation": (lambda r: (r / XML).unlink(), "a.tif: no annotation"),
    "annotation without image": (lambda r: (r / IMAGE).unlink(), "t.xml: no image"),
    "mask without image": (lambda r: (r / "more/MoNuSegTrainingData/images/b.tif").unlink(), "b.tif: no image"),
    "size mismatch": (lambda r: save_mask(r / MASK, np.ones((40, 39), np.uint8)), "39 x 40 px but its image"),
    "truncated image": (lambda r: truncate(r / IMAGE), "t.tif cannot be decoded"),
    "empty image": (lambda r: (r / IMAGE).write_bytes(b""), "t.tif is not an image"),
    "text as image": (lambda r: (r / IMAGE).write_text("hello"), "t.tif is not an image"),
    "truncated mask": (lambda r: truncate(r / MASK), "b.tif cannot be decoded"),
    "float mask": (lambda r: save_mask(r / MASK, np.ones((40, 40), np.float32)), "b.tif holds floating-point"),
    "negative mask": (lambda r: save_mask(r / MASK, np.full((40, 40), -1, np.int32)), "b.tif holds negative"),
    "broken XML": (lambda r: (r / XML).write_text(SQUARE[:50]), "a.xml: not a usable Aperio XML"),
    "XML without region": (lambda r: (r / XML).write_text("<A/>"), "a.xml: no Region"),
    "XML with entities": (lambda r: (r / XML).write_text('<!DOCTYPE A [<!ENTITY e "x">]>' + SQUARE), "document type"),
    "image smaller than the patch": (
        lambda r: Image.new("RGB", (15, 40)).save(r / IMAGE),
        "t.tif: 15 x 40 px is smaller",
    ),
    "one slide in both splits": (
        lambda r: (r / "MoNuSegTestData").rename(r / "test2") and copy_a(r),
        "are the same slide",
    ),
    "unknown split": (lambda r: (r / "MoNuSegTestData").rename(r / "other"), "training or test"),
}


def copy_a(root):
    for suffix, source in (
        (".tif", root / XML.replace("Annotations/a.xml", "Tissue Images/a.tif")),
        (".xml", root / XML),
    ):
        (root / "test2" / f"a{suffix}").write_bytes(source.read_bytes())


def refusal(capsys, *arguments):
    """Runs the program as the command line would; the one line it prints."""
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: prepare(*arguments))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("flaw", FLAWS)
def test_bad_input_is_one_line_and_nothing_is_written(raw, tmp_path, capsys, flaw):
    damage, what = FLAWS[flaw]
    damage(raw)
    before = snapshot(tmp_path)
    line = refusal(capsys, raw, tmp_path / "deep" / "out", *SIZE)
    assert re.search(what, line), line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--patch_size", 0), "--patch_size is 0"),
        (("--stride", -1), "--stride is -1"),
        (("--mode", "odd"), "--mode is 'odd'"),
        (("--mode", "mirror", "--patch_size", 8, "--stride", 16), "--stride is 16"),
        (("--resize", 0), "--resize 0 must lie in"),
        (("--patch_size", 41), "41 px"),
    ],
)
def test_bad_flags(raw, tmp_path, capsys, flags, what):
    assert what in refusal(capsys, raw, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_frame_around_the_nuclei_is_named(raw, tmp_path, capsys):
    (raw / XML).write_text(f"<B>{SQUARE}{re.sub('3', '0', SQUARE).replace('8', '39')}</B>")
    prepare(raw, tmp_path / "out", *SIZE)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("WARNING"))
    assert "a.xml: region 2 of 2 lies around 1 of the others, and counts as a nucleus: remove it" in line


def test_bad_folders(raw, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert "nowhere" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "RAW itself" in refusal(capsys, raw, raw, *SIZE)
    for out in (
        raw / "MoNuSegTestData",
        raw / "MoNuSegTestData/p",
        raw / "more/MoNuSegTrainingData/images",
        raw / "more",
    ):
        assert "among the raw data" in refusal(capsys, raw, out, *SIZE)
    assert "is a file" in refusal(capsys, raw, raw / IMAGE, *SIZE)
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert "no slides" in refusal(capsys, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="--num_workers 0 must lie in"):
        prepare_monuseg.main([str(raw), str(tmp_path / "out"), "--num_workers", "0"])


def test_sets_of_patches_are_not_mixed(raw, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(raw, out, *SIZE)
    before = snapshot(out)
    capsys.readouterr()
    assert "holds prepared patches" in refusal(capsys, out, tmp_path / "again", *SIZE)
    assert "--stride is 8, but" in refusal(capsys, raw, out, "--patch_size", 16, "--stride", 8)
    assert "--resize is 8, but" in refusal(capsys, raw, out, *SIZE, "--resize", 8)
    assert "slide a in" in refusal(capsys, raw / "more", out, *SIZE)
    assert snapshot(out) == before
    (out / "prepare.json").write_text("{")
    assert "prepare.json" in refusal(capsys, raw, out, *SIZE)
    (out / "prepare.json").unlink()
    assert "not by this command" in refusal(capsys, raw, out, *SIZE)


def test_the_command_line(raw, quick, tmp_path):
    def run(*arguments):
        command = [quick, SCRIPT, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    (raw / MASK).rename(tmp_path / "mask")
    failed = run(raw, tmp_path / "out", *SIZE)
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    (tmp_path / "mask").rename(raw / MASK)
    truncate(raw / IMAGE)
    failed = run(raw, tmp_path / "out", *SIZE)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "t.tif" in failed.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not MONUSEG.is_dir(), reason="MoNuSeg is not here")
def test_real_monuseg(tmp_path):
    out = tmp_path / "out"
    prepare_monuseg.main([str(MONUSEG), str(out), "--patch_size", "500", "--stride", "500", "--resize", "125"])
    counts = json.loads((out / "prepare.json").read_text())["patches"]
    assert {split: (len(c), sum(c.values())) for split, c in counts.items()} == {TRAIN: (30, 120), TEST: (14, 56)}
    for name in patches.SUFFIXES:
        assert len(list((out / TRAIN / name).iterdir())) == 120
    covered = [(np.asarray(Image.open(path)) > 0).mean() for path in (out / TEST / "bin_masks").iterdir()]
    assert 0.1 < np.mean(covered) < 0.4


def test_a_foreign_patch_of_any_number_is_kept(tmp_path):
    toy.write_toy_monuseg(tmp_path / "raw", train=1, test=1)
    stem = next((tmp_path / "raw").rglob("*.tif")).stem
    for split in ("MoNuSegTrainingData", "MoNuSegTestData"):
        (tmp_path / "out" / split / "images").mkdir(parents=True)
        (tmp_path / "out" / split / "images" / f"{stem}_002.png").write_text("mine")
    with pytest.raises(ValueError, match=f"{stem}_002.png is there but not by this command"):
        prepare_monuseg.main([str(tmp_path / "raw"), str(tmp_path / "out"), "--num_workers", "1"])
    assert not list((tmp_path / "out").rglob("*_000.png"))


def test_one_run_at_a_time_that_tidies_up(raw, tmp_path):
    """Of two at once the second is refused; what a killed one had begun to write goes."""
    out = tmp_path / "out"
    prepare(raw, out, *SIZE)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    (out / TRAIN / "images" / ".a_000.png.12.part").touch()
    held = "with files.locked(sys.argv[1], ''): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", f"import sys; from guided_diffusion import files\n{held}", out]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match=f"OUT {out} is in use by process {holder.pid}"):
            prepare(raw, out, *SIZE)
        holder.stdin.close()
    prepare(raw, out, *SIZE)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before
