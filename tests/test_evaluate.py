"""evaluate.py: real, synthetic and predicted folders in; metrics.json, pictures and a table out."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch as th
from conftest import draw_patch, write_class_masks, write_patches
from PIL import Image
from skimage.measure import label

from guided_diffusion import cli
from guided_diffusion.cell_classes import named, write_classes
from guided_diffusion.histology.evaluation import report as evaluation_report
from guided_diffusion.histology.evaluation.evaluator import Evaluator, PatchSet
from guided_diffusion.histology.evaluation.runs import Run, Sample
from guided_diffusion.histology.segmenter import decoding
from guided_diffusion.histology.segmenter.agreement import structure_metric
from guided_diffusion.images import Item
from guided_diffusion.results import ResultFolder
from scripts import evaluate


def write_run(path, count=8, s="1.5", checkpoint="ema_0.99_000100.pt", size=32, first=200, kinds=("real",)):
    """A results folder whose samples are drawn patches; each condition comes twice, kinds of structure by turns."""
    folder = ResultFolder(path)
    folder.open()
    for k in range(count):
        image, inst = draw_patch(first + k, size)
        folder.write(
            dict(
                index=k,
                stem=f"s{k}_000",
                seed=0,
                structure=f"data/slide-{k % 4}_000.png",
                appearance=f"data/slide-{k % 4}_001.png",
                s=s,
                checkpoint=f"run/{checkpoint}",
                sampler="ddpm",
                steps=5,
                structure_kind=kinds[k % len(kinds)],
            ),
            image=image,
            label=(inst > 0).astype(np.uint8),
            cond=image,
            sample=image,
            inst=inst,
        )
    folder.merge()
    return path


@pytest.fixture
def real(tmp_path):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=12)
    write_patches(tmp_path / "data" / "MoNuSegTestData", count=8, first=100)
    return tmp_path / "data"


@pytest.fixture
def sweep(tmp_path):
    for i, s in enumerate(("1", "1.5", "2")):
        write_run(tmp_path / "sweep" / f"m_s{s}", s=s, first=200 + 20 * i)
    return tmp_path / "sweep"


def run(real, synthetic, out, *flags):
    evaluate.main(
        [
            "--data_dir",
            str(real),
            "--synthetic",
            str(synthetic),
            "--results_path",
            str(out),
            "--backbone",
            "stain",
            *map(str, flags),
        ]
    )
    return json.loads((out / "metrics.json").read_text())


def test_a_sweep_beside_the_real_floor(real, sweep, tmp_path, capsys):
    metrics = run(real, sweep, tmp_path / "out")
    assert list(metrics["runs"]) == ["m_s1", "m_s1.5", "m_s2"]
    figures = ["kid", "frechet", "precision", "recall", "colour_od", "colour_grey"]
    figures += ["nearest_features", "nearest_pixels", "copies", "diversity"]
    for row in (metrics["floor"], metrics["other_slides"], *metrics["runs"].values()):
        assert list(row) == figures
        assert row["kid"]["low"] <= row["kid"]["value"] <= row["kid"]["high"] and row["diversity"] > 0
        # 12 and 8 images are too few for 35 features.
        assert row["frechet"] is None
    # The samples are their own appearances here.
    assert all(row["colour_grey"] == 0 for row in metrics["runs"].values()) and metrics["floor"]["colour_grey"] > 0
    out = capsys.readouterr().out
    assert "fewer than 36 patches" in out
    assert re.search(r"^real, same slides  .*\d", out, re.M) and re.search(r"^real, other slides .*\d", out, re.M)
    assert Image.open(tmp_path / "out" / "metrics.png").width > 900
    assert not list((tmp_path / "out").glob(".*.part"))


def test_equal_seeds_give_equal_files(real, sweep, tmp_path):
    assert run(real, sweep, tmp_path / "a") == run(real, sweep, tmp_path / "b", "--batch_size", 3)


def test_only_the_metrics_asked_for(real, sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_backbone", None)  # colours need none
    metrics = run(real, sweep / "m_s1", tmp_path / "out", "--metrics", "colour", "--limit", 5)
    assert list(metrics["floor"]) == ["colour_od", "colour_grey"] and list(metrics["runs"]) == ["m_s1"]


def write_fields(path, shapes, first=200):
    """A results folder of fields, each of a mosaic of write_run's patches, with colours of another size."""
    folder, k = ResultFolder(path), first
    folder.open()
    for index, (rows, columns) in enumerate(shapes):
        drawn = [[draw_patch(k + row * columns + column) for column in range(columns)] for row in range(rows)]
        image, inst = (np.concatenate([np.concatenate([p[i] for p in row], 1) for row in drawn]) for i in (0, 1))
        k += rows * columns
        names = dict(structure=f"data/slide-{index}_000.png", appearance=f"data/slide-{index}_001.png")
        row = dict(names, index=index, stem=f"f{index}", seed=0, s="1.5", checkpoint="m.pt", sampler="ddpm", steps=5)
        look = dict(image=image[:20, :50], cond=image, sample=image)
        folder.write(row, **look, inst=inst, label=(inst > 0).astype(np.uint8))
    folder.merge()
    return path


def test_fields_are_cut_into_patches(real, sweep, tmp_path):
    """So that they score as their patches do; but for colours, which are a whole field's."""
    fields = write_fields(tmp_path / "fields", [(2, 2), (1, 3), (1, 1)])
    row, of_patches = (
        run(real, synthetic, tmp_path / f"{synthetic.name}-out")["runs"][synthetic.name]
        for synthetic in (fields, sweep / "m_s1")
    )
    same = ["kid", "precision", "recall", "nearest_features"]
    assert [row[name] for name in same] == [of_patches[name] for name in same]
    assert row["colour_grey"] > 0 == of_patches["colour_grey"]


def test_a_segmenter_sees_fields_in_patches(real, tmp_path, monkeypatch):
    """As all else is measured, so that it finds no more than in the real patches that it is compared with."""
    sizes, find = [], decoding.Segmenter.find
    monkeypatch.setattr(decoding.Segmenter, "find", lambda self, image: sizes.append(image.shape) or find(self, image))
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-0"])
    fields = write_fields(tmp_path / "runs/fields", [(2, 2), (1, 3)], first=0)
    rows = run(real, fields, tmp_path / "out", "--metrics", "structure", "--model_path", model)["runs"]
    assert list(rows["fields"]) == ["f1", "aji"]
    assert set(sizes) == {(32, 32, 3)} and len(sizes) >= 7


def test_copies_are_drawn(real, sweep, tmp_path, capsys):
    source = real / "MoNuSegTrainingData" / "images" / "slide-1_002.png"
    shutil.copy(source, sweep / "m_s1" / "samples" / "s3_000.png")
    with pytest.raises(ValueError, match=r"--metrics copies takes 4 training patches or more, .* has 3, or --limit"):
        run(real, sweep / "m_s1", tmp_path / "out", "--metrics", "copies", "--limit", "3")
    metrics = run(real, sweep / "m_s1", tmp_path / "out", "--metrics", "copies")
    assert metrics["runs"]["m_s1"]["copies"] >= 1 / 8
    assert "nearer to a training patch" in capsys.readouterr().out and (tmp_path / "out" / "copies.png").exists()


@pytest.mark.parametrize("by_pixels", [True, False])
def test_copies_are_drawn_beside_what_told_them(monkeypatch, tmp_path, by_pixels):
    away = np.diag(np.arange(9, 17.0))
    evaluator = Evaluator(draw_set("train", range(8), away), ["copies"])
    # By features the first training patch, by pixels the second, or an unrelated one.
    samples = draw_set("m", [1 if by_pixels else 50], away[:1])
    drawn = []
    monkeypatch.setattr(evaluation_report, "draw_pairs", lambda pairs, path: drawn.extend(pairs))
    items = [Item(f"p{i}", "", "") for i in range(8)]
    evaluate.draw_copies(evaluator, [samples], items, tmp_path / "copies.png")
    ((_, patch, caption),) = drawn
    assert np.array_equal(patch, evaluator.train.images[1 if by_pixels else 0])
    assert caption == ("m | p1\npixels 0.000" if by_pixels else "m | p0\nfeatures 0.000")


def draw_set(name, seeds, features):
    images, inst_maps = map(np.stack, zip(*map(draw_patch, seeds)))
    return PatchSet(name, images, inst_maps, features.astype(np.float32), [name] * len(images))


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        ([("run/ema.pt", "1.5"), ("run/ema.pt", "1.50")], ("ema", 1.5)),
        ([("run/ema.pt", "1.5"), ("run/ema.pt", "2")], ("kept", None)),
        ([("run/ema.pt", "1.5"), ("run/model.pt", "1.5")], ("kept", None)),
        ([("run/ema.pt", "")], ("kept", None)),
    ],
)
def test_a_run_has_a_place_where_all_its_samples_agree(tmp_path, rows, place):
    samples = [Sample("a", tmp_path, tmp_path, None, dict(checkpoint=c, s=s)) for c, s in rows]
    assert evaluate.place(Run("kept", tmp_path, samples)) == place


@pytest.mark.parametrize("flag", ["--backbone stain", "--model_path m.pt", "--limit 2", "--metrics kid"])
def test_flags_that_masks_have_no_use_for(tmp_path, flag):
    masks = write_masks(tmp_path / "masks")
    folders = ["--predicted", str(masks), "--truth", str(masks), "--results_path", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=f"{flag} is not for --predicted and --truth: leave it out"):
        evaluate.main([*folders, *flag.split()])


def save_segmenter(path, slides):
    content = decoding.as_content(decoding.seeded_net(), slides)
    th.save(content, path)
    return path


def test_structure_by_a_segmenter(real, sweep, tmp_path):
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-0"])
    metrics = run(real, sweep / "m_s1", tmp_path / "out", "--metrics", "structure", "--model_path", model)
    assert metrics["floor"] == {}  # the segmenter may know the training slides
    for row in (metrics["other_slides"], metrics["runs"]["m_s1"]):
        assert list(row) == ["f1", "aji"] and 0 <= row["f1"]["low"] <= row["f1"]["value"] <= row["f1"]["high"] <= 1


def test_structure_of_the_real_patches_with_the_same_masks(real, tmp_path):
    """Samples that are their structures' real patches agree with the masks just as those do, also under --limit."""
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-0"])
    results = write_run(tmp_path / "results", count=3)
    training = real / "MoNuSegTrainingData"
    for k in range(3):
        shutil.copy(training / "images" / f"slide-{k}_000.png", results / "samples" / f"s{k}_000.png")
        shutil.copy(training / "inst_masks" / f"slide-{k}_000.tif", results / "inst_masks" / f"s{k}_000.tif")
    flags = "--metrics", "structure", "--model_path", model, "--limit", 2
    row = run(real, results, tmp_path / "out", *flags)["runs"]["results"]
    assert list(row) == ["f1", "aji", "f1_originals", "aji_originals"]
    assert row["f1_originals"] == row["f1"] and row["aji_originals"] == row["aji"]


def take_apart(both, kinds):
    """Beside a run whose structures are of two kinds by turns, make one of each kind alone."""
    for number, kind in enumerate(kinds):
        apart = shutil.copytree(both, both.parent / kind)
        for sample in apart.glob("samples/s*_000.png"):
            if int(sample.stem[1:-4]) % 2 != number:
                sample.unlink()


def test_structure_of_each_kind_apart(real, tmp_path):
    """As in runs of one kind each, where a made structure counts for the slide of its appearance."""
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-0"])
    take_apart(write_run(tmp_path / "runs/both", kinds=("real", "recombine")), ("real", "recombine"))
    rows = run(real, tmp_path / "runs", tmp_path / "out", "--metrics", "structure", "--model_path", model)["runs"]
    assert list(rows["real"]) == list(rows["recombine"]) == ["f1", "aji"]
    assert list(rows["both"]) == ["f1", "aji", "f1_real", "aji_real", "f1_recombine", "aji_recombine"]
    for kind in ("real", "recombine"):
        assert rows["both"][f"f1_{kind}"] == rows[kind]["f1"] and rows["both"][f"aji_{kind}"] == rows[kind]["aji"]
    known = {"slide-1_000": "slide-1"}
    sample = Sample("s", None, None, None, {"structure": "m/made_007.tif", "appearance": "d/slide-1_000.png"})
    assert [evaluate.pooled_with(sample, kind, known) for kind in ("real", "recombine")] == ["made", "slide-1"]


CLASSES = named(["odd", "even"])


def classed_segmenter(folder, monkeypatch):
    """One that calls all nuclei odd."""
    net = decoding.seeded_net(classes=2)
    th.save(decoding.as_content(net, ["slide-0"], classes=CLASSES), folder / "segmenter.pt")

    def find(self, image):
        found = label(image[..., 0] < 155)
        return found, dict.fromkeys(range(1, found.max() + 1), 1)

    monkeypatch.setattr(decoding.Segmenter, "find", find)
    return folder / "segmenter.pt"


def real_samples(real, results, kinds=("real",)):
    """Three samples that are their structures' real patches; these, the test patches and the samples have classes."""
    write_run(results, count=3, kinds=kinds)
    training = real / "MoNuSegTrainingData"
    for k in range(3):
        shutil.copy(training / f"images/slide-{k}_000.png", results / f"samples/s{k}_000.png")
        shutil.copy(training / f"inst_masks/slide-{k}_000.tif", results / f"inst_masks/s{k}_000.tif")
    for folder, owner in ((real / "MoNuSegTestData", real), (training, real), (results, results)):
        write_class_masks(folder, rare=2)
        write_classes(owner, CLASSES)
    return results


def test_classes_by_a_segmenter_that_knows_them(real, tmp_path, monkeypatch):
    """Of test patches, samples, and their originals, which are the samples here."""
    model, results = classed_segmenter(tmp_path, monkeypatch), real_samples(real, tmp_path / "results")
    flags = "--metrics", "structure", "--model_path", model
    found = run(real, results, tmp_path / "out", *flags)
    row, other = found["runs"]["results"], found["other_slides"]
    names = ["f1", "aji", "class_accuracy", "class_f1_odd", "class_f1_even"]
    assert list(other) == names and list(row) == [*names, *(f"{name}_originals" for name in names)]
    assert all(row[name] == row[f"{name}_originals"] for name in names)
    assert row["class_f1_even"]["value"] == 0 < row["class_f1_odd"]["value"] < row["f1"]["value"]
    assert 0.2 < other["class_accuracy"]["value"] < 0.8
    (results / "class_masks" / "s1_000.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"class_masks/s1_000.png is gone"):
        run(real, results, tmp_path / "other", *flags)
    write_classes(real, named(["a", "b"]))
    with pytest.raises(
        ValueError, match=r"MoNuSegTestData has other classes of nuclei \(1 a, 2 b\) than the segmenter"
    ):
        run(real, results, tmp_path / "other", *flags)


def test_fields_keep_their_classes(real, tmp_path, monkeypatch):
    model, fields = classed_segmenter(tmp_path, monkeypatch), write_fields(tmp_path / "fields", [(1, 2), (2, 1)])
    for folder, owner in (
        (real / "MoNuSegTestData", real),
        (real / "MoNuSegTrainingData", real),
        (fields, fields),
    ):
        write_class_masks(folder, rare=2)
        write_classes(owner, CLASSES)
    kept, cut = [], evaluate.synthetic_set
    monkeypatch.setattr(evaluate, "synthetic_set", lambda *given: kept.append(cut(*given)) or kept[-1])
    row = run(real, fields, tmp_path / "out", "--metrics", "structure", "--model_path", model)["runs"]["fields"]
    assert row["class_f1_even"]["value"] == 0 < row["class_f1_odd"]["value"]
    (patches,) = kept
    assert patches.inst_maps.shape == (4, 32, 32)
    for inst_map, of_nucleus in zip(patches.inst_maps, patches.classes, strict=True):
        ids = np.unique(inst_map[inst_map > 0]).tolist()
        assert ids and [of_nucleus[own] for own in ids] == [1 + (own % 2 == 0) for own in ids]


def test_classes_of_each_kind_apart(real, tmp_path, monkeypatch):
    """As in runs of one kind each; a kind has no figure of a class that none of its nuclei has."""
    model = classed_segmenter(tmp_path, monkeypatch)
    both = real_samples(real, tmp_path / "runs/both", ("real", "given"))
    ids = np.asarray(Image.open(both / "inst_masks/s1_000.tif"))
    Image.fromarray((ids > 0).astype(np.uint8)).save(both / "class_masks/s1_000.png")  # all are odd
    take_apart(both, ("real", "given"))
    rows = run(real, both.parent, tmp_path / "out", "--metrics", "structure", "--model_path", model)["runs"]
    names = ["f1", "aji", "class_accuracy", "class_f1_odd", "class_f1_even"]
    kinds = [f"{name}{kind}" for kind in ("", "_given", "_real") for name in names]
    assert list(rows["both"]) == [*kinds, *(f"{name}_originals" for name in kinds)]
    for kind in ("given", "real"):
        assert list(rows[kind]) == [*names, *(f"{name}_originals" for name in names)]
        for name in names:
            for end in ("", "_originals"):
                assert rows["both"][f"{name}_{kind}{end}"] == rows[kind][f"{name}{end}"]
    assert rows["both"]["class_f1_even_given"] is None and rows["both"]["class_f1_even_real"]["value"] == 0
    assert rows["both"]["class_accuracy_given"]["value"] == 1 > rows["both"]["class_accuracy_real"]["value"]
    monkeypatch.chdir(both)  # a folder may be named by a dot
    again = run(real, ".", tmp_path / "again", "--metrics", "structure", "--model_path", model)["runs"]
    assert again == {"both": rows["both"]}


def test_figures_of_originals_are_of_each_runs_slides_and_kinds(tmp_path):
    """Also where the same real patches are the originals of several runs."""
    images, inst_maps = map(np.stack, zip(*map(draw_patch, range(2))))
    first = PatchSet("first", images, inst_maps, np.empty((2, 0)), ["a", "b"], originals=images)
    others = replace(first, slides=["a", "a"]), replace(first, kinds=["real", "given"])
    segmenter = decoding.Segmenter(decoding.seeded_net(), th.device("cpu"))
    shared = structure_metric(segmenter)
    for patches in (first, *others):
        assert shared(patches) == structure_metric(segmenter)(patches)


def test_a_sweeps_originals_are_segmented_once(real, tmp_path, monkeypatch):
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-0"])
    for s in ("1", "2"):
        results = write_run(tmp_path / "sweep" / f"s{s}", count=3, s=s)
        for k in range(3):
            mask = real / "MoNuSegTrainingData" / "inst_masks" / f"slide-{k}_000.tif"
            shutil.copy(mask, results / "inst_masks" / f"s{k}_000.tif")
    calls = []
    find = decoding.Segmenter.find
    monkeypatch.setattr(decoding.Segmenter, "find", lambda self, image: calls.append(1) or find(self, image))
    metrics = run(real, tmp_path / "sweep", tmp_path / "out", "--metrics", "structure", "--model_path", model)
    assert len(calls) == 8 + 2 * 3 + 3  # what is held out, the samples, and their originals
    assert metrics["runs"]["s1"]["f1_originals"] == metrics["runs"]["s2"]["f1_originals"]


def test_a_segmenter_that_knows_the_floor_is_refused(real, sweep, tmp_path):
    model = save_segmenter(tmp_path / "segmenter.pt", ["slide-25"])
    with pytest.raises(ValueError, match="was trained on slide slide-25, which is to set"):
        run(real, sweep, tmp_path / "out", "--model_path", model)


# ---- masks ----


def write_masks(folder, shift=0, count=3, size=32):
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(np.roll(draw_patch(k, size)[1], shift, axis=1)).save(folder / f"slide-{k}_000.tif")
    return folder


def compare(predicted, truth, out):
    evaluate.main(["--predicted", str(predicted), "--truth", str(truth), "--results_path", str(out)])
    return json.loads((out / "metrics.json").read_text())


def test_without_test_patches_there_is_one_floor(real, sweep, tmp_path, capsys):
    shutil.rmtree(real / "MoNuSegTestData")
    metrics = run(real, sweep, tmp_path / "out", "--metrics", "kid")
    assert metrics["other_slides"] is None and metrics["floor"].keys() == metrics["runs"]["m_s2"].keys() == {"kid"}
    assert "real, other slides" not in capsys.readouterr().out


def test_masks(tmp_path, capsys):
    truth, moved = write_masks(tmp_path / "truth"), write_masks(tmp_path / "moved", shift=1)
    same, other = compare(truth, truth, tmp_path / "a"), compare(moved, truth, tmp_path / "b")
    assert same["mean"]["f1@0.9"]["mean"] == same["mean"]["aji"]["low"] == 1
    assert 0 < other["mean"]["aji"]["mean"] < 1 and len(other["images"]) == 3
    assert re.search(r"^aji +1 \[1, 1\]$", capsys.readouterr().out, re.M)


# ---- mistakes ----


def shared_slide(real, sweep):
    for name, suffix in (("images", "png"), ("inst_masks", "tif"), ("bin_masks", "png")):
        source = real / "MoNuSegTrainingData" / name / f"slide-0_000.{suffix}"
        shutil.copy(source, real / "MoNuSegTestData" / name / f"slide-0_009.{suffix}")


def no_mask(real, sweep):
    (sweep / "m_s1" / "inst_masks" / "s0_000.tif").unlink()


def small_mask(real, sweep):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(sweep / "m_s1" / "inst_masks" / "s0_000.tif")


def dead_link(real, sweep):
    path = sweep / "m_s1" / "samples" / "s0_000.png"
    path.unlink()
    path.symlink_to("nowhere.png")


def small_samples(real, sweep):
    shutil.rmtree(sweep / "m_s1")
    write_run(sweep / "m_s1", size=24)


def no_samples(real, sweep):
    for path in (sweep / "m_s1" / "samples").iterdir():
        path.unlink()


def few(real, sweep):
    for k in range(3, 8):
        for path in sweep.glob(f"m_s1/*/s{k}_000.*"):
            path.unlink()


def nothing(real, sweep):
    pass


MISTAKES = {
    "shared slide": (shared_slide, [], r"slide slide-0 among training and test patches"),
    "no mask": (no_mask, [], r"s0_000.png has no mask .*s0_000.tif"),
    "small mask": (small_mask, [], r"s0_000.tif is 9 x 9 px, its image .* 32 x 32"),
    "dead link": (dead_link, [], r"s0_000.png is a link that leads nowhere"),
    "other size": (small_samples, [], r"s0_000.png is 24 x 24 px, the patches of --data_dir 32 x 32"),
    "no samples": (no_samples, [], r"samples holds no .png"),
    "too few": (few, [], r"at least 4 images a side, and there are 3"),
    "metric": (nothing, ["--metrics", "kid,fid"], r"unknown --metrics fid: choose some of kid, frechet"),
    "segmenter": (nothing, ["--metrics", "structure"], r"--metrics structure needs --model_path"),
    "no segmenter": (nothing, ["--model_path", "none.pt"], r"none.pt"),
    "of nothing": (nothing, ["--metrics", "kid", "--model_path", "none.pt"], r"none.pt is of the metric structure"),
    "no metric": (nothing, ["--metrics", ""], r"--metrics '' names none: choose some of kid"),
    "seed": (nothing, ["--seed", "-7"], r"--seed -7 must be at least 0"),
    "backbone": (nothing, ["--backbone", "vgg"], r"vgg"),
    "precision": (nothing, ["--precision", "fp8"], r"--precision fp8: choose one of fp32, bf16"),
    "device": (nothing, ["--device", "gpu"], r"--device gpu"),
    "adapt": (nothing, ["--adapt", "-1"], r"--adapt -1.0 must lie in"),
    "batch": (nothing, ["--batch_size", "0"], r"--batch_size 0 must lie in"),
    "both": (nothing, ["--truth", "x", "--predicted", "x"], r"give either --data_dir and --synthetic, or"),
    "half": (nothing, ["--truth", "x"], r"--predicted with --truth"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_write_nothing(real, sweep, tmp_path, capsys, name):
    damage, flags, message = MISTAKES[name]
    damage(real, sweep)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: run(real, sweep, tmp_path / "out", *flags))
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_pair(tmp_path):
    truth, fewer = write_masks(tmp_path / "truth"), write_masks(tmp_path / "fewer", count=2)
    with pytest.raises(ValueError, match=r"truth has slide-2_000, .*fewer has not"):
        compare(fewer, truth, tmp_path / "out")
    larger = write_masks(tmp_path / "larger", size=40)
    with pytest.raises(ValueError, match=r"larger/slide-0_000.tif is 40 x 40 px, .* 32 x 32"):
        compare(larger, truth, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no mask"):
        compare(tmp_path / "empty", truth, tmp_path / "out")
    assert not (tmp_path / "out").exists()
