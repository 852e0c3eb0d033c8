"""Layouts from the command line: files, going on, the report, mistakes."""

import json
import re

import numpy as np
import pytest
from conftest import write_patches
from PIL import Image

from guided_diffusion import cell_classes, cli, magnification
from guided_diffusion.histology.slides import toy
from guided_diffusion.histology.structures.statistics import FIGURES
from guided_diffusion.images import list_structures
from guided_diffusion.structures import fragments, oddities
from scripts import make_structures


@pytest.fixture
def data(tmp_path):
    """Four masks of two toy slides."""
    folder = tmp_path / "data" / "MoNuSegTrainingData"
    for number in range(4):
        slide = toy.draw_slide(number, 96)
        for name, array, suffix in (("images", slide.image, "png"), ("inst_masks", slide.inst_map, "tif")):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"slide-{number // 2}_{number % 2:03d}.{suffix}")
    (tmp_path / "data" / "prepare.json").write_text('{"mpp": 0.5}')
    return tmp_path / "data"


def make(data, out, *flags):
    make_structures.main([str(data), "--out", str(out), "--num_workers", "1", *flags])
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "inst_masks").iterdir())}


@pytest.mark.parametrize("method", make_structures.METHODS)
def test_layouts_report_and_going_on(data, tmp_path, capsys, method):
    flags = ["--size", "64", "--method", method]
    made = make(data, tmp_path / "out", "--count", "3", *flags)
    assert list(made) == [f"made_{number:06d}.tif" for number in range(3)]
    assert all(layout.shape == (64, 64) and layout.dtype == np.uint16 and layout.any() for layout in made.values())
    report = json.loads((tmp_path / "out/structures.json").read_text())
    assert report["count"] == 3 and list(report["figures"]) == list(FIGURES)
    report["figures"].pop("turn")  # of elongated neighbours, which so few slides may lack
    assert all(row["between_halves"] >= 0 <= row["distance"] for row in report["figures"].values())
    assert Image.open(tmp_path / "out/structures.png").width > 1000
    assert magnification.of_data(tmp_path / "out") == 0.5
    assert [item.slide for item in list_structures(str(tmp_path / "out"), "--structure_dir")] == [
        f"made_{number:06d}" for number in range(3)
    ]
    (tmp_path / "out/inst_masks/made_000001.tif").unlink()
    more = make(data, tmp_path / "out", "--count", "4", *flags, "--num_workers", "2")
    assert len(more) == 4 and all(np.array_equal(more[name], layout) for name, layout in made.items())
    with pytest.raises(ValueError, match=f"was begun with method {method}, this run has"):
        make(
            data,
            tmp_path / "out",
            "--count",
            "4",
            "--size",
            "64",
            "--method",
            "recombine perturb".replace(method, "").strip(),
        )
    with pytest.raises(ValueError, match="holds 4 layouts, more than --count 3: give as many"):
        make(data, tmp_path / "out", "--count", "3", *flags)
    assert "4 layouts; look at" in capsys.readouterr().out


@pytest.mark.parametrize("method", make_structures.METHODS)
@pytest.mark.parametrize("mpp", [0.5, 0.25])
def test_specks_of_the_annotation_come_into_no_layout(data, tmp_path, method, mpp):
    """Sampling would refuse them: --min_nucleus, 10 px at 40x."""
    (data / "prepare.json").write_text(json.dumps({"mpp": mpp}))
    rng = np.random.default_rng(0)
    for path in (data / "MoNuSegTrainingData/inst_masks").iterdir():
        mask = np.array(Image.open(path))
        for _ in range(60):
            top, left = rng.integers(1, 94, 2)
            if not mask[top - 1 : top + 2, left - 1 : left + 2].any():
                mask[top, left] = mask.max() + 1
        Image.fromarray(mask).save(path)
    made = make(data, tmp_path / "out", "--count", "4", "--size", "64", "--method", method)
    for layout in made.values():
        assert len(np.unique(layout)) == layout.max() + 1 > 3
        assert fragments(layout, magnification.area(10, mpp)) == []


@pytest.fixture
def with_classes(data):
    """The same, with two classes of nuclei, by their area."""
    (data / "MoNuSegTrainingData/class_masks").mkdir()
    for path in (data / "MoNuSegTrainingData/inst_masks").iterdir():
        inst = np.asarray(Image.open(path))
        classes = np.where(inst > 0, 1 + (np.bincount(inst.ravel())[inst] > 120), 0).astype(np.uint8)
        Image.fromarray(classes).save(data / f"MoNuSegTrainingData/class_masks/{path.stem}.png")
    cell_classes.write_classes(data, cell_classes.named(["small", "large"]))
    return data


@pytest.mark.parametrize("method", make_structures.METHODS)
def test_classes_go_with_their_nuclei(with_classes, tmp_path, capsys, method):
    out, flags = tmp_path / "out", ["--count", "3", "--size", "64", "--method", method]
    made = make(with_classes, out, *flags)
    assert cell_classes.read_classes(out) == cell_classes.named(["small", "large"])
    items, counts = list_structures(str(out), "--structure_dir", classes=True), np.zeros(3)
    assert all(item.cell_classes for item in items)
    paths = sorted((out / "class_masks").iterdir())
    for (name, inst), path in zip(made.items(), paths, strict=True):
        assert path.stem == name[:-4]
        numbers = cell_classes.of_nuclei(inst.astype(int), np.asarray(Image.open(path)), (1, 2), name).values()
        counts += np.bincount(list(numbers), minlength=3)
    report = json.loads((out / "structures.json").read_text())
    assert list(report["figures"]) == list(FIGURES) and list(report["classes"]) == ["small", "large"]
    for number, row in enumerate(report["classes"].values(), 1):
        assert row["made"] == pytest.approx(counts[number] / counts.sum())
        assert row["between_halves"] >= 0 <= row["distance"] and 0.1 < row["real"] < 0.9
    assert "made: share of the nuclei" in capsys.readouterr().out
    before = paths[1].read_bytes()
    paths[1].unlink()
    make(with_classes, out, *flags)
    assert paths[1].read_bytes() == before


def test_perturb_makes_any_size(with_classes, tmp_path):
    """Larger than its masks are, with their classes."""
    made = make(with_classes, tmp_path / "out", "--count", "2", "--size", "230", "--method", "perturb")
    for name, layout in made.items():
        assert layout.shape == (230, 230) and not fragments(layout, 10) and oddities(layout) == ""
        shown = np.asarray(Image.open(tmp_path / f"out/class_masks/{name.replace('.tif', '.png')}"))
        assert {*np.unique(shown)} == {0, 1, 2} and np.array_equal(shown > 0, layout > 0)
    assert not np.array_equal(*made.values())


def test_class_masks_that_are_wrong_are_named(with_classes, tmp_path):
    path = with_classes / "MoNuSegTrainingData/class_masks/slide-0_001.png"
    Image.fromarray(np.asarray(Image.open(path)) * np.uint8(3)).save(path)
    with pytest.raises(
        ValueError, match=r"slide-0_001.png: nucleus \d+ is of class [36], which is not in classes.json"
    ):
        make(with_classes, tmp_path / "out", "--count", "1", "--size", "64")
    assert not (tmp_path / "out").exists()


MISTAKES = {
    "count": (["--count", "0"], "--count 0 must lie in"),
    "method": (["--method", "paint"], "unknown --method paint: choose one of recombine, perturb"),
    "small": (["--size", "9"], r"--size 9 is below the largest nucleus of DATA, \d+ px"),
    "among the data": (["--out", "data/masks"], "lies among the data"),
    "vast": (["--size", "10001"], "--size 10001 must lie in"),
    "file": (["--out", "file"], "--results_path file: file is a file, or a link"),
    "below a file": (["--out", "file/x"], "--results_path file/x: file is a file, or a link"),
    "damaged": (["--out", "damaged"], "damaged/structures.json is damaged, so what was begun there is not known"),
    "not even a table": (["--out", "broken"], "broken/structures.json is damaged"),
    "floats": (["--out", "out"], r"slide-0_000\.tif holds floating-point numbers"),
    "strange": (["--out", "strange"], "--results_path strange holds inst_masks that this program did not make"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_write_nothing(data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "strange/inst_masks").mkdir(parents=True)
    for folder, text in (("damaged", '{"settings": {"met'), ("broken", "[1]")):
        (tmp_path / folder / "inst_masks").mkdir(parents=True)
        (tmp_path / folder / "structures.json").write_text(text)
    if name == "floats":
        Image.fromarray(np.ones((96, 96), np.float32)).save(data / "MoNuSegTrainingData/inst_masks/slide-0_000.tif")
    flags, message = MISTAKES[name]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: make_structures.main(["data", "--out", "out", "--count", "2", *flags]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_kill_before_the_first_layout_is_nothing_strange(data, tmp_path, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_structures, "write_json", killed)
        make(data, tmp_path / "out", "--count", "1", "--size", "64")
    assert len(make(data, tmp_path / "out", "--count", "1", "--size", "64")) == 1


@pytest.mark.parametrize("method", make_structures.METHODS)
def test_no_nucleus(tmp_path, method):
    folder = write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=2)
    for path in (folder / "inst_masks").iterdir():
        Image.fromarray(np.zeros((24, 24), np.uint16)).save(path)
    with pytest.raises(ValueError, match="data: no mask has a nucleus"):
        make(tmp_path / "data", tmp_path / "out", "--count", "1", "--size", "16", "--method", method)


def test_no_whole_nucleus(tmp_path, capsys):
    folder = write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=2)
    for path in (folder / "inst_masks").iterdir():
        Image.fromarray(np.ones((24, 24), np.uint16)).save(path)
    with pytest.raises(SystemExit):
        cli.run(lambda: make(tmp_path / "data", tmp_path / "out", "--count", "1"))
    assert "no mask has a nucleus that its border does not cut" in capsys.readouterr().err
