"""The command that segments images and measures: its files, its figures, and the mistakes that it names."""

import json

import numpy as np
import pytest
import torch as th
from conftest import write_class_masks, write_patches
from PIL import Image

from guided_diffusion import slides
from guided_diffusion.cell_classes import named, of_nuclei, read_classes, write_classes
from guided_diffusion.histology.evaluation import class_metrics, instance_metrics
from guided_diffusion.histology.segmenter.decoding import as_content, load_segmenter
from guided_diffusion.histology.segmenter.net import seeded_net
from scripts import evaluate, segment


@pytest.fixture
def model(tmp_path):
    """A network of chance weights, which says nucleus in many places."""
    net = seeded_net()
    with th.no_grad():
        net.head.weight[:4] *= 30
    th.save(as_content(net, ["slide-0", "Human_01"], ["slide-9"]), tmp_path / "segmenter.pt")
    return tmp_path / "segmenter.pt"


@pytest.fixture
def split(tmp_path):
    """Three patches of slide-1 and slide-2."""
    return write_patches(tmp_path / "data" / "MoNuSegTestData", count=3, size=64, first=6)


def run(model, split, out, *flags, truth=True):
    masks = ["--truth", str(split / "inst_masks")] if truth else []
    segment.main([str(model), str(split / "images"), "--results_path", str(out), "--device", "cpu", *masks, *flags])


def read(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def test_masks_pictures_and_figures(model, split, tmp_path, capsys):
    out = tmp_path / "out"
    run(model, split, out)
    stems = ["slide-1_002", "slide-1_003", "slide-2_000"]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == [
        *(f"inst_masks/{stem}.tif" for stem in stems),
        "metrics.json",
        *(f"overlays/{stem}.png" for stem in stems),
    ]
    figures = json.loads((out / "metrics.json").read_text())
    segmenter = load_segmenter(model, th.device("cpu"))
    rows = []
    for stem in stems:
        _, image = read(split / "images" / f"{stem}.png")
        _, truth = read(split / "inst_masks" / f"{stem}.tif")
        mode, found = read(out / "inst_masks" / f"{stem}.tif")
        assert mode == "I;16" and found.dtype == np.uint16
        assert np.array_equal(found, segmenter.segment(image)) and found.any()
        rows.append(instance_metrics.tally(truth, found))
        mode, overlay = read(out / "overlays" / f"{stem}.png")
        assert mode == "RGB" and overlay.shape == image.shape
        assert {segment.FOUND, segment.TRUE} <= {tuple(pixel) for pixel in overlay.reshape(-1, 3)}
    assert list(figures["images"].values()) == [row.figures() for row in rows]
    assert figures["average"] == instance_metrics.summarise(rows, ["slide-1", "slide-1", "slide-2"])
    pooled = [instance_metrics.pooled(rows[:count]).figures() for count in (2, 3)]
    assert figures["slides"] == {"slide-1": pooled[0], "slide-2": rows[2].figures()} and figures["pooled"] == pooled[1]
    printed = capsys.readouterr().out
    assert "3 images" in printed and f"{figures['average']['aji']['mean']:.3f}" in printed


def test_a_model_of_classes_writes_and_measures_them(split, tmp_path, capsys):
    out, model, classes = tmp_path / "out", tmp_path / "classed.pt", named(["odd", "even"])
    net = seeded_net(classes=2)
    with th.no_grad():
        net.head.weight[:4] *= 30
    th.save(as_content(net, [], classes=classes), model)
    run(model, split, out)
    average = json.loads((out / "metrics.json").read_text())["average"]
    assert read_classes(out) == classes and "class_f1" not in average  # there are no true ones
    write_class_masks(split, rare=2)
    write_classes(split.parent, classes)
    run(model, split, out)
    figures, tallies = json.loads((out / "metrics.json").read_text()), []
    for stem in figures["images"]:
        (_, truth), (_, true_map) = (
            read(split / name) for name in (f"inst_masks/{stem}.tif", f"class_masks/{stem}.png")
        )
        (_, found), (mode, found_map) = (
            read(out / name) for name in (f"inst_masks/{stem}.tif", f"class_masks/{stem}.png")
        )
        sides = [of_nuclei(*pair, {1, 2}, stem) for pair in ((truth, true_map), (found, found_map))]
        assert (
            mode == "L"
            and sides[1] == load_segmenter(model, th.device("cpu")).find(read(split / "images" / f"{stem}.png")[1])[1]
        )
        tallies.append(class_metrics.tally(truth, sides[0], found, sides[1], classes))
    assert list(figures["images"].values()) == [own.figures() for own in tallies]
    assert figures["average"] == instance_metrics.summarise(tallies, ["slide-1", "slide-1", "slide-2"])
    assert "class_f1_even" in capsys.readouterr().out
    masks = ["--predicted", str(out / "inst_masks"), "--truth", str(split / "inst_masks")]
    evaluate.main([*masks, "--results_path", str(tmp_path / "compared")])
    compared = json.loads((tmp_path / "compared" / "metrics.json").read_text())
    assert compared == {"mean": figures["average"], "images": figures["images"]}
    write_classes(split.parent, named(["odd", "even", "neither"]))
    with pytest.raises(ValueError, match=r"class_masks has other classes of nuclei \(1 odd, 2 even, 3 neither\) than"):
        run(model, split, tmp_path / "other")
    plain = as_content(seeded_net(), [])
    th.save(plain, model)
    with pytest.raises(ValueError, match="out has class_masks, and MODEL tells no classes"):
        run(model, split, out)


def test_one_slide_has_no_interval_and_another_magnification_is_said(model, tmp_path, capsys):
    split = write_patches(tmp_path / "one" / "MoNuSegTestData", count=2, size=64, first=4)
    (tmp_path / "one" / "prepare.json").write_text('{"mpp": 0.5}')
    slides.write_table(tmp_path / "one", [(path.name, "S") for path in (split / "images").iterdir()])
    run(model, split, tmp_path / "out")
    average = json.loads((tmp_path / "out" / "metrics.json").read_text())["average"]
    assert average["aji"]["low"] is average["aji"]["high"] is None
    printed = capsys.readouterr().out
    assert f"aji{average['aji']['mean']:13.3f}   -\n" in printed
    assert f"MODEL {model} was trained at 0.25 um a pixel, {split / 'images'} has 0.5" in printed


def test_without_truth_there_are_no_figures(model, split, tmp_path):
    run(model, split, tmp_path / "out", truth=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["inst_masks", "overlays"]


def test_statistics_of_the_test_image_can_be_left_out(model, split, tmp_path):
    _, image = read(split / "images" / "slide-2_000.png")
    for share in ("0", "1"):
        out = tmp_path / share
        run(model, split, out, "--adapt", share)
        _, found = read(out / "inst_masks" / "slide-2_000.tif")
        assert np.array_equal(found, load_segmenter(model, th.device("cpu"), adapt=float(share)).segment(image))
        assert json.loads((out / "metrics.json").read_text())["adapt"] == float(share)
    probabilities = [load_segmenter(model, th.device("cpu"), adapt=share).predict(image)[0] for share in (0, 1)]
    assert not np.allclose(*probabilities, atol=1e-3)
    with pytest.raises(ValueError, match="--adapt 1.5 must lie in"):
        run(model, split, tmp_path / "out", "--adapt", "1.5")


def test_flips_and_centre(model, split, tmp_path):
    run(model, split, tmp_path / "out", "--flips", "True", "--centre", "40")
    _, image = read(split / "images" / "slide-2_000.png")
    _, found = read(tmp_path / "out" / "inst_masks" / "slide-2_000.tif")
    assert np.array_equal(found, load_segmenter(model, th.device("cpu"), flips=True).segment(image[12:52, 12:52]))


def rename(split, stem):
    for folder, suffix in (("images", ".png"), ("inst_masks", ".tif")):
        (split / folder / f"slide-2_000{suffix}").rename(split / folder / f"{stem}{suffix}")


def trained_slide(model, split):
    rename(split, "slide-0_000")


def other_size(model, split):
    Image.fromarray(np.ones((64, 60), np.int32)).save(split / "inst_masks" / "slide-2_000.tif")


def float_mask(model, split):
    Image.fromarray(np.ones((64, 64), np.float32)).save(split / "inst_masks" / "slide-2_000.tif")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda model, split: (split / "inst_masks" / "slide-2_000.tif").unlink(), "slide-2_000.png has no mask"),
        (lambda model, split: (split / "images" / "slide-2_000.png").unlink(), "slide-2_000.tif has no image"),
        (lambda model, split: [path.unlink() for path in (split / "images").iterdir()], "holds no image"),
        (other_size, "60 x 64 px but .*64 x 64 px"),
        (float_mask, "floating-point numbers"),
        (trained_slide, "trained on slide slide-0 of --truth"),
        (lambda model, split: rename(split, "Human_01"), "trained on slide Human_01 of --truth"),
        (lambda model, split: rename(split, "slide-9_000"), "chosen by slide slide-9 of --truth"),
        (lambda model, split: model.write_bytes(b"x"), "is broken"),
        (lambda model, split: th.save({"state_dict": {}}, model), "another kind"),
        (lambda model, split: model.unlink(), "there is no file"),
        (lambda model, split: (split / "images" / "slide-2_000.png").write_bytes(b"x"), "slide-2_000.png"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(model, split, tmp_path, damage, what):
    damage(model, split)
    with pytest.raises((ValueError, FileNotFoundError), match=what):
        run(model, split, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trained_slide_may_be_segmented_without_truth(model, split, tmp_path):
    trained_slide(model, split)
    run(model, split, tmp_path / "out", truth=False)
    assert (tmp_path / "out" / "inst_masks" / "slide-0_000.tif").exists()


def test_input_is_never_written_over(model, split, tmp_path):
    before = {p: p.read_bytes() for p in split.rglob("*.*")}
    for out in (split, split / "images", split / "inst_masks"):
        with pytest.raises(ValueError, match="would write among"):
            run(model, split, out)
    with pytest.raises(ValueError, match="is a file"):
        run(model, split, model)
    assert {p: p.read_bytes() for p in split.rglob("*.*")} == before


def test_flags_out_of_range_are_named(model, split, tmp_path):
    with pytest.raises(ValueError, match="--centre -1"):
        run(model, split, tmp_path / "out", "--centre", "-1")
    with pytest.raises(ValueError, match="--device abacus"):
        segment.main([str(model), str(split / "images"), "--results_path", str(tmp_path / "out"), "--device", "abacus"])
