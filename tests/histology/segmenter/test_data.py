"""What is held out, what would leak, and the crops that are drawn of the rest."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch as th
from conftest import draw_patch, write_class_masks, write_patches
from PIL import Image

from guided_diffusion.cell_classes import CellClass, named, write_classes
from guided_diffusion.histology.segmenter import data as segmenter_data
from guided_diffusion.histology.segmenter.data import Crops, Example, Pair
from guided_diffusion.histology.segmenter.decoding import hv_target


def pair(stem, *slides, synthetic=False):
    slides = slides or (stem.rpartition("_")[0],)
    return Pair(stem, f"{stem}.png", f"{stem}.tif", frozenset(slides), synthetic)


REAL = [pair(f"{slide}_{k:03d}") for slide in "ABCDEFGHIJ" for k in range(3)]


def examples(count=4, size=48):
    return [Example(f"s-{k}_000", *draw_patch(k, size)) for k in range(count)]


def test_a_checksum_tells_names_and_contents(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "a.tif", "b.png", "none.png")]
    for path, content in zip(paths, (b"1", b"2", b"1")):
        path.write_bytes(content)

    def checksum(image, mask):
        return segmenter_data.checksum([Pair("a", image, mask, frozenset())])

    image, mask, other, missing = paths
    found = {checksum(*pair) for pair in ((image, mask), (mask, image), (other, mask), (missing, mask))}
    first = checksum(image, mask)
    mask.write_bytes(b"3")
    assert len(found | {checksum(image, mask)}) == 5 and first in found


def test_whole_slides_are_held_out():
    train, held, left = segmenter_data.hold_out(REAL, 0.2, seed=0)
    assert sorted([*train, *held], key=lambda p: p.stem) == REAL and not left
    slides = [set().union(*(p.slides for p in part)) for part in (train, held)]
    assert len(slides[1]) == 2 and not slides[0] & slides[1]
    assert segmenter_data.hold_out(REAL, 0.2, seed=0) == (train, held, left)
    assert any(segmenter_data.hold_out(REAL, 0.2, seed=k)[1] != held for k in range(1, 5))


def test_what_is_made_from_a_held_out_slide_is_left_out():
    held_slide = segmenter_data.hold_out(REAL, 0.01, seed=0)[1][0].slides
    (name,) = held_slide
    other = "A" if name != "A" else "B"
    synthetic = [
        pair("x0", other, other, synthetic=True),
        pair("x1", name, other, synthetic=True),
        pair("x2", other, name, synthetic=True),
    ]
    train, held, left = segmenter_data.hold_out([*REAL, *synthetic], 0.01, seed=0)
    assert synthetic[0] in train and left == synthetic[1:]
    assert not any(p.synthetic for p in held) and {p.slides for p in held} == {held_slide}


def test_synthetic_pictures_add_no_slides_to_hold_out():
    pairs = [*REAL[:6], *(pair(f"x{k}", "A", "B", synthetic=True) for k in range(9))]  # two real slides
    assert segmenter_data.hold_out(pairs, 0.2, 0) == (pairs, [], [])


def test_nothing_is_held_out_of_two_slides_or_by_a_share_of_0():
    assert segmenter_data.hold_out(REAL[:6], 0.5, 0) == (REAL[:6], [], [])
    assert segmenter_data.hold_out(REAL, 0, 0) == (REAL, [], [])


def test_a_share_that_leaves_none_and_an_unknown_source_are_refused():
    with pytest.raises(ValueError, match="--val_share 0.99 leaves no training slide of 10"):
        segmenter_data.hold_out(REAL, 0.99, 0)
    with pytest.raises(ValueError, match="does not say where x comes from"):
        segmenter_data.hold_out([*REAL, pair("x", "A", "", synthetic=True)], 0.2, 0)


def test_pairs_know_their_slides(data_dir):
    pairs = segmenter_data.training_pairs(data_dir)
    assert [p.stem for p in pairs] == [f"slide-{k // 4}_{k % 4:03d}" for k in range(8)]
    assert pairs[5].slides == {"slide-1"} and not any(p.synthetic for p in pairs)
    assert pairs[5].image.name == "slide-1_001.png" and pairs[5].mask.name == "slide-1_001.tif"


def test_a_manifest_tells_the_synthetic_ones(data_dir):
    (data_dir / "manifest.csv").write_text(
        "stem,source,structure,appearance,slide\n"
        "slide-0_000,real,,,\n"
        "slide-0_001,synthetic,data/images/TCGA-1_004.png,TCGA_2_017.png,other\n"
        "slide-0_002,synthetic,,,TCGA_2\n"
    )
    pairs = segmenter_data.training_pairs(data_dir)
    assert [p.stem for p in pairs if p.synthetic] == ["slide-0_001", "slide-0_002"]
    assert [set(p.slides) for p in pairs[:4]] == [{"slide-0"}, {"TCGA-1", "other"}, {"", "TCGA_2"}, {"slide-0"}]


def test_a_manifest_of_something_else_is_refused(data_dir):
    (data_dir / "manifest.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns stem and source"):
        segmenter_data.training_pairs(data_dir)


@pytest.mark.parametrize(
    ("remove", "what"),
    [
        ("inst_masks/slide-0_001.tif", "slide-0_001.png has no mask"),
        ("images/slide-0_001.png", "slide-0_001.tif has no image"),
    ],
)
def test_different_stems_are_refused(data_dir, remove, what):
    (data_dir / "MoNuSegTrainingData" / remove).unlink()
    with pytest.raises(ValueError, match=what):
        segmenter_data.training_pairs(data_dir)


def test_missing_folders_and_doubles_are_refused(tmp_path, data_dir):
    with pytest.raises(FileNotFoundError, match="has no MoNuSegTrainingData"):
        segmenter_data.training_pairs(tmp_path)
    folder = data_dir / "MoNuSegTrainingData"
    (folder / "images" / "slide-0_000.tif").write_bytes((folder / "images" / "slide-0_000.png").read_bytes())
    with pytest.raises(ValueError, match="share a stem"):
        segmenter_data.training_pairs(data_dir)
    (folder / "images" / "slide-0_000.tif").unlink()
    (folder / "inst_masks").rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="inst_masks is not a folder"):
        segmenter_data.training_pairs(data_dir)


def test_slides_on_both_sides_are_named():
    with pytest.raises(ValueError, match="slide C of TEST is trained on"):
        segmenter_data.check_no_overlap(REAL, ["Z", "C"], "TEST")
    with pytest.raises(ValueError, match="slide Q of TEST"):
        segmenter_data.check_no_overlap([pair("x", "A", "Q", synthetic=True)], ["Q"], "TEST")
    segmenter_data.check_no_overlap(REAL, ["Z"], "TEST")


def test_a_mask_of_another_size_is_refused(tmp_path):
    a, b = write_patches(tmp_path / "a" / "S", 1, 32), write_patches(tmp_path / "b" / "S", 1, 40)
    name = "slide-0_000"
    with pytest.raises(ValueError, match="40 x 40 px but .* is 32 x 32 px"):
        segmenter_data.read_example(name, a / "images" / f"{name}.png", b / "inst_masks" / f"{name}.tif")


def test_validation_takes_as_many_pixels_of_a_slide_whatever_its_pieces():
    large = Example("A_000", np.zeros((1000, 900, 3)), np.arange(900000).reshape(1000, 900))
    whole = segmenter_data.validation_part([large])
    assert whole[0].inst_map.shape == (400, 400) and whole[0].inst_map[0, 0] == 300 * 900 + 250
    patch = np.zeros((128, 128), np.int32)
    cut = [Example(f"{k}", patch, patch, "AB"[k // 64]) for k in range(128)]
    patches = segmenter_data.validation_part(cut)
    assert len(patches) == 18 and len({e.stem for e in patches}) == 18
    assert len(segmenter_data.validation_part(cut[:3])) == 3


def test_a_crop_depends_on_seed_and_index_alone():
    a, b = Crops(examples(), 32, seed=5), Crops(examples(), 32, seed=5)
    b[3]
    for index in (0, 7, 10**9):
        assert all(np.array_equal(x, y) for x, y in zip(a[index], b[index]))
    assert not np.array_equal(a[0][0], a[1][0])
    assert not np.array_equal(a[0][0], Crops(examples(), 32, seed=6)[0][0])


def test_classes_are_those_of_the_cropped_nuclei_and_change_no_crop():
    """Crops of (seed, index) are what they are without classes; the fourth map is constant in a nucleus."""
    classes = [CellClass(number, str(number), (0, 0, 0)) for number in (3, 7)]
    plain = examples()
    of_nucleus = [{n: 7 if n < 10 else 3 for n in np.unique(e.inst_map).tolist() if n} for e in plain]
    known = [replace(example, of_nucleus=own) for example, own in zip(plain, of_nucleus)]
    seen = set()
    for index in range(12):
        image, target = Crops(plain, 32, 5)[index]
        same, more = Crops(known, 32, 5, classes=classes)[index]
        assert th.equal(image, same) and th.equal(target, more[:3]) and more.shape == (4, 32, 32)
        assert th.equal(more[3] > 0, target[0] > 0)
        seen |= set(more[3].unique().tolist())
    assert seen == {0, 1, 2}
    inst_map = np.kron(np.arange(1, 10, dtype=np.int32).reshape(3, 3), np.ones((16, 16), np.int32))
    example = Example("A", np.repeat((20 * inst_map).astype(np.uint8)[..., None], 3, 2), inst_map)
    crops = Crops(
        [replace(example, of_nucleus={n: 3 + 4 * (n % 2) for n in range(1, 10)})], 16, 0, colour=False, classes=classes
    )
    image, (*_, of_class) = crops[1]
    exact = (image[..., 0] % 20) == 0  # not between two nuclei
    assert th.equal(of_class[exact], 1 + (image[..., 0] // 20 % 2).float()[exact]) and exact.sum() > 100


def test_class_masks_are_of_all_images_or_of_none(data_dir):
    folder, classes = data_dir / "MoNuSegTrainingData", named(["a", "b"])
    before = segmenter_data.checksum(segmenter_data.training_pairs(data_dir))
    assert segmenter_data.classes_of(segmenter_data.training_pairs(data_dir)) == []
    write_class_masks(folder, rare=2)
    pairs = segmenter_data.training_pairs(data_dir)
    with pytest.raises(ValueError, match=r"slide-0_000.png has classes, but no folder above it the classes.json"):
        segmenter_data.classes_of(pairs)
    write_classes(data_dir, classes)
    assert segmenter_data.classes_of(pairs) == classes and segmenter_data.checksum(pairs) != before
    example = segmenter_data.read_pair(pairs[3], classes)
    assert example.of_nucleus == {n: 1 + (n % 2 == 0) for n in np.unique(example.inst_map).tolist() if n}
    assert segmenter_data.read_pair(pairs[3]).of_nucleus == {}
    wrong = np.where(example.inst_map > 0, 3, 0).astype(np.uint8)
    Image.fromarray(wrong).save(folder / "class_masks" / "slide-0_003.png")
    with pytest.raises(ValueError, match=r"slide-0_003.png: nucleus \d+ is of class 3, which is not in classes.json"):
        segmenter_data.read_pair(pairs[3], classes)
    (folder / "class_masks" / "slide-1_001.png").unlink()
    with pytest.raises(ValueError, match=r"slide-1_001.png has no mask slide-1_001.\* in .*class_masks"):
        segmenter_data.training_pairs(data_dir)


def test_target_is_that_of_the_turned_crop():
    inst_map = np.arange(48 * 48, dtype=np.int32).reshape(48, 48) // 200
    image = np.repeat((inst_map % 256).astype(np.uint8)[..., None], 3, axis=2)
    crops = Crops([Example("A", image, inst_map)], 48, seed=0, colour=False)
    seen = set()
    for index in range(40):
        picture, target = crops[index]
        assert picture.shape == (48, 48, 3) and target.shape == (3, 48, 48)
        shown = np.asarray(picture)[..., 0].astype(np.int32)
        if not set(np.unique(shown)) <= set(np.unique(inst_map)):
            continue
        if np.unique(shown).size == 12 and (np.bincount(shown.ravel())[:11] == 200).all():
            assert np.allclose(target[1:], hv_target(shown).transpose(2, 0, 1), atol=1e-6)
            assert np.array_equal(target[0], shown > 0)
            seen.add(shown.tobytes())
    assert len(seen) > 3


@pytest.mark.parametrize("side", [32, 96])
def test_picture_and_target_of_a_crop_lie_on_each_other(side):
    """Whatever its scale: a shift of half a pixel is much of a small nucleus."""
    inst_map = np.zeros((side, side), np.int32)
    for own, (row, column) in enumerate(np.ndindex(side // 16, side // 16), start=1):
        cv2.circle(inst_map, (16 * column + 7, 16 * row + 7), 5, own, cv2.FILLED)
    image = np.repeat(np.where(inst_map, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    crops, found = Crops([Example("A", image, inst_map)], 32, 0, colour=False), []
    for index in range(60):
        picture, target = crops[index]
        seen, true = picture[..., 0].numpy() > 127, target[0].numpy() > 0
        found.append((seen & true).sum() / (seen | true).sum())
    assert np.mean(found) > 0.94, np.mean(found)


@pytest.mark.filterwarnings("error")
def test_crops_of_images_that_must_not_be_written_to():
    image, inst_map = np.full((16, 16, 3), 200, np.uint8), np.zeros((16, 16), np.int32)
    image.flags.writeable = False  # as Pillow gives them
    crops = Crops([Example("A", image, inst_map)], 16, seed=0, colour=False)
    for index in range(40):  # some of them neither turned nor resized
        crops[index][0].zero_()
    assert (image == 200).all()


def test_large_images_are_drawn_from_more_often():
    large, small = np.ones((60, 60), np.int32), np.zeros((30, 30), np.int32)
    crops = Crops([Example(s, np.zeros((*m.shape, 3), np.uint8), m) for s, m in (("a", large), ("b", small))], 16, 0)
    share = np.mean([float(crops[k][1][0].mean()) for k in range(300)])
    assert share == pytest.approx(0.8, abs=0.08)


def test_synthetic_images_first_and_then_real_ones():
    kinds = [
        Example(s, np.zeros((16, 16, 3), np.uint8), np.full((16, 16), int(s == "made")), synthetic=s == "made")
        for s in ("made", "real")
    ]
    ways = [dict(real_from=12, apart=True), dict(real_from=12), {}]
    shown = [[float(Crops(kinds, 16, 0, **way)[k][1][0].mean()) for k in range(24)] for way in ways]
    assert shown[0] == [1] * 12 + [0] * 12
    assert shown[1] == shown[2][:12] + [0] * 12 and 4 < sum(shown[2][:12]) < 9 and sum(shown[2][12:])
    with pytest.raises(ValueError, match="take images of both kinds: DATA has none of one"):
        Crops(kinds[1:], 16, 0, real_from=12)


def test_where_nuclei_are_not_known_is_no_background(data_dir):
    folder = data_dir / "MoNuSegTrainingData"
    (folder / "ignore_masks").mkdir()
    ignored = np.zeros((32, 32), np.uint8)
    ignored[:, :16] = 255
    Image.fromarray(ignored).save(folder / "ignore_masks" / "slide-0_002.png")
    plain, pair = segmenter_data.find_pairs(folder)[1:3]
    truth, found = draw_patch(2)[1], segmenter_data.read_pair(pair).inst_map
    assert plain.ignored is None and segmenter_data.checksum([pair]) != segmenter_data.checksum(
        [replace(pair, ignored=None)]
    )
    assert np.array_equal(found == segmenter_data.UNKNOWN, (ignored > 0) & (truth == 0))
    assert np.array_equal(np.maximum(found, 0), truth)
    _, target = Crops([segmenter_data.read_pair(pair)], 32, 0)[0]
    assert {*target[0].unique().tolist()} == {-1, 0, 1} and not target[1:, target[0] < 1].any()
    # Single bits say as much; a mask of no image says nothing, so it is a mistake.
    Image.fromarray(ignored > 0).save(folder / "ignore_masks" / "slide-0_002.png")
    assert np.array_equal(segmenter_data.read_pair(pair).inst_map, found)
    Image.fromarray(ignored).save(folder / "ignore_masks" / "slide-9_002.png")
    with pytest.raises(ValueError, match=r"ignore_masks/slide-9_002.png has no image in"):
        segmenter_data.find_pairs(folder)


def test_a_crop_larger_than_an_image_is_refused():
    with pytest.raises(ValueError, match="--crop 64 is larger than s-0_000, 48 x 48"):
        Crops(examples(), 64, 0)
