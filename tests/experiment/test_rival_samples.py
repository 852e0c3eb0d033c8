"""What synthetic patches are held against: results folders that assemble_set.py takes, of what they should be."""

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import write_class_masks, write_patches
from PIL import Image

from guided_diffusion import cell_classes, cli
from guided_diffusion.histology.segmenter.data import classes_of as classes_in
from guided_diffusion.histology.segmenter.data import read_pair, training_pairs
from guided_diffusion.histology.segmenter.decoding import as_content, instances, load_segmenter
from guided_diffusion.histology.segmenter.net import seeded_net
from guided_diffusion.histology.segmenter.pseudo import confident
from guided_diffusion.images import list_items
from guided_diffusion.stains import colour_statistics
from scripts import assemble_set
from scripts.experiment import rival_samples, subset_slides

CLASSES = cell_classes.named(["small", "large"])


@pytest.fixture
def split(tmp_path):
    """Two of five slides, of four patches each."""
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=20)
    subset_slides.main([str(tmp_path / "data"), str(tmp_path / "split"), "--subsample", "0.4", "--val_share", "0"])
    return tmp_path / "split"


def make(kind, split, count, *flags, name=""):
    out = split.parent / (name or kind)
    rival_samples.main([kind, str(split), "--results_path", str(out), "--count", str(count), *map(str, flags)])
    with open(out / "manifest.csv", newline="") as file:
        return out, list(csv.DictReader(file))


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_patches_of_unseen_slides_have_their_own_masks(split):
    out, rows = make("unseen", split, 6)
    unseen = {item.stem: item for item in list_items(str(split / "others"), "monuseg")}
    assert len(rows) == 6 and len({row["structure_slide"] for row in rows}) == 3
    for row in rows:
        assert os.path.samefile(out / f"samples/{row['stem']}.png", unseen[row["stem"]].image)
        assert os.path.samefile(out / f"inst_masks/{row['stem']}.tif", unseen[row["stem"]].inst_mask)
    assert len(make("unseen", split, 99, name="all")[1]) == 12


def test_transferred_patches_have_other_slides_colours(split):
    out, rows = make("transfer", split, 20)
    seen = {item.slide: [] for item in list_items(str(split / "seen"), "monuseg")}
    assert {row["structure_slide"] for row in rows} == set(seen)
    assert len({(row["structure"], row["appearance_slide"]) for row in rows}) == 20  # no pair twice
    assert not {row["appearance_slide"] for row in rows} & set(seen)
    lent = {}
    for path in sorted((split / "unlabelled").glob("*.png")):
        lent.setdefault(path.stem.rpartition("_")[0], []).append(read(path))
    # What a slide's patches became has, all together, the mean colours of the slide that lent them.
    (slide, target), *_ = {
        (row["structure_slide"], row["appearance_slide"]) for row in rows if row["stem"].endswith("_000")
    }
    own = [row for row in rows if (row["structure_slide"], row["appearance_slide"]) == (slide, target)]
    for row in own:
        mask = split / "seen/MoNuSegTrainingData/inst_masks" / f"{Path(row['structure']).stem}.tif"
        assert os.path.samefile(out / f"inst_masks/{row['stem']}.tif", mask)
    found = colour_statistics([read(out / f"samples/{row['stem']}.png") for row in own])
    original = colour_statistics([read(split / "seen/MoNuSegTrainingData/images" / row["structure"]) for row in own])
    wanted = colour_statistics(lent[target])
    assert np.abs(found[0] - wanted[0]).max() < np.abs(original[0] - wanted[0]).max()


def test_pseudo_labels_are_what_a_segmenter_is_sure_of(split, tmp_path):
    flags = save_segmenter(tmp_path / "segmenter.pt", [])
    out, rows = make("pseudo", split, 5, *flags)
    segmenter = load_segmenter(tmp_path / "segmenter.pt", th.device("cpu"))
    for row in rows:
        maps = segmenter.predict(read(split / "unlabelled" / row["structure"]))
        kept, ignored = confident(maps.probability, instances(maps.probability, maps.position, segmenter.mpp))
        assert np.array_equal(read(out / f"inst_masks/{row['stem']}.tif"), kept)
        assert np.array_equal(read(out / f"ignore_masks/{row['stem']}.png") > 0, ignored) and kept.any()
        assert os.path.samefile(out / f"samples/{row['stem']}.png", split / "unlabelled" / row["structure"])
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*.*") if path.name != "manifest.csv"}
    (out / "inst_masks" / f"{rows[0]['stem']}.tif").unlink()  # as a kill leaves it
    make("pseudo", split, 5, *flags)
    after = {path: path.lstat().st_mtime_ns for path in before}
    assert {path.stem for path in before if before[path] != after[path]} == {rows[0]["stem"]}
    # A segmenter learns from them, but is not chosen by them.
    assemble_set.main(
        ["--data_dir", str(split), "--synthetic", str(out), "--results_path", str(tmp_path / "set"), "--ratio", "all"]
    )
    pairs = training_pairs(tmp_path / "set")
    assert [pair.synthetic for pair in pairs].count(True) == 5 == sum(pair.ignored is not None for pair in pairs)


def test_pseudo_labels_are_of_whole_slides(split, tmp_path, capsys):
    """Where these are there: patches are cut from the labels of the whole, so that they fit beside each other."""
    flags = save_segmenter(tmp_path / "segmenter.pt", [])
    patches = {path.stem: read(path) for path in sorted((split / "unlabelled").glob("*.png"))}
    slide = next(iter(patches)).rpartition("_")[0]
    own = {stem: image for stem, image in patches.items() if stem.startswith(f"{slide}_")}
    whole = np.concatenate([*own.values()], axis=1)
    (tmp_path / "slides").mkdir()
    Image.fromarray(whole).save(tmp_path / "slides" / f"{slide}.png")
    out, _ = make("pseudo", split, 99, *flags, "--slides_dir", tmp_path / "slides")
    assert f"{len(patches)} patches, {len(patches) - len(own)} of them looked at without" in capsys.readouterr().out
    maps = load_segmenter(tmp_path / "segmenter.pt", th.device("cpu")).predict(whole)
    kept, ignored = confident(maps.probability, instances(maps.probability, maps.position, 0.25))
    masks = [
        [read(out / f"{kind}/{stem}") for stem in (f"{name}{end}" for name in own)]
        for kind, end in (("inst_masks", ".tif"), ("ignore_masks", ".png"))
    ]
    assert np.array_equal(np.concatenate(masks[0], axis=1), kept) and kept.any()
    assert np.array_equal(np.concatenate(masks[1], axis=1) > 0, ignored)


@pytest.fixture
def classed(tmp_path):
    """Like split, with nuclei of two classes."""
    folder = write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=20)
    write_class_masks(folder, rare=2)
    cell_classes.write_classes(tmp_path / "data", CLASSES)
    subset_slides.main([str(tmp_path / "data"), str(tmp_path / "split"), "--subsample", "0.4", "--val_share", "0"])
    return tmp_path / "split"


def save_segmenter(path, classes):
    """Of chance weights, that is sure of some nuclei, and of the classes of some of these; :return: flags."""
    net = seeded_net(classes=len(classes))
    with th.no_grad():
        net.head.weight[:4] *= 2000
        if classes:  # alike for the four pixels of which each stands for one
            net.class_head.weight[:] = 200 * net.class_head.weight[::4].repeat_interleave(4, dim=0)
    th.save(as_content(net, ["slide-0"], classes=classes), path)
    return "--model_path", path, "--device", "cpu"


def of_nuclei(folder, stem):
    """What a results folder's, or a split's, class mask says of the nuclei of its instance mask."""
    class_map = read(folder / f"class_masks/{stem}.png")
    return cell_classes.of_nuclei(read(folder / f"inst_masks/{stem}.tif"), class_map, {1, 2}, stem)


def assemble(split, out, name):
    assemble_set.main(["--data_dir", str(split), "--synthetic", str(out), "--results_path", name, "--ratio", "all"])
    return Path(name) / "MoNuSegTrainingData"


def test_pseudo_labels_have_the_classes_that_a_segmenter_is_sure_of(classed, tmp_path, capsys):
    flags = save_segmenter(tmp_path / "segmenter.pt", CLASSES)
    out, rows = make("pseudo", classed, 5, *flags)
    segmenter, left_out, known = load_segmenter(tmp_path / "segmenter.pt", th.device("cpu")), 0, set()
    for row in rows:
        image = read(classed / "unlabelled" / row["structure"])
        maps, (_, of_nucleus) = segmenter.predict(image), segmenter.find(image)
        found = instances(maps.probability, maps.position, segmenter.mpp)
        kept, ignored = confident(maps.probability, found, maps.of_class)
        left_out += np.count_nonzero(confident(maps.probability, found)[0]) - np.count_nonzero(kept)
        assert np.array_equal(read(out / f"inst_masks/{row['stem']}.tif"), kept)
        assert np.array_equal(read(out / f"ignore_masks/{row['stem']}.png") > 0, ignored)
        wanted = {nucleus: of_nucleus[nucleus] for nucleus in np.unique(kept[kept > 0]).tolist()}
        assert of_nuclei(out, row["stem"]) == wanted
        counts = Counter(wanted.values())
        assert row["classes"] == " ".join(f"{number}:{counts[number]}" for number in sorted(counts))
        known |= set(counts)
    assert left_out > 0 and known and cell_classes.read_classes(out) == CLASSES
    some = next(row["stem"] for row in rows if row["classes"])
    (out / "class_masks" / f"{some}.png").unlink()  # as where it was made without classes
    assert make("pseudo", classed, 5, *flags)[1] == rows and of_nuclei(out, some)
    made = assemble(classed, out, str(tmp_path / "set"))
    pairs = training_pairs(tmp_path / "set")
    examples = {pair.stem: read_pair(pair, classes_in(pairs)) for pair in pairs}
    with open(tmp_path / "set" / "manifest.csv", newline="") as file:
        taken = {row["stem"]: row for row in csv.DictReader(file) if row["source"] == "synthetic"}
    assert len(taken) == 5 and {row["classes"] for row in taken.values()} == {row["classes"] for row in rows}
    for stem, row in taken.items():
        assert examples[stem].of_nucleus == of_nuclei(out, Path(row["sample"]).stem) == of_nuclei(made, stem)
    assert "left out" not in capsys.readouterr().out


def test_a_segmenter_without_classes_leaves_them_out_of_the_set(classed, tmp_path, capsys):
    out, rows = make("pseudo", classed, 5, *save_segmenter(tmp_path / "segmenter.pt", []))
    assert not (out / "class_masks").exists() and not (out / "classes.json").exists() and not rows[0]["classes"]
    made = assemble(classed, out, str(tmp_path / "set"))
    assert not (made / "class_masks").exists() and not (tmp_path / "set" / "classes.json").exists()
    assert "classes of cells are left out: 5 of 13 patches have no class_masks\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["transfer", "unseen"])
def test_rivals_with_true_masks_have_their_classes(classed, tmp_path, kind):
    out, rows = make(kind, classed, 9)
    source = classed / ("seen" if kind == "transfer" else "others") / "MoNuSegTrainingData"
    for row in rows:
        own = of_nuclei(out, row["stem"])
        assert own == of_nuclei(source, Path(row["structure"]).stem)
        assert sum(int(part.partition(":")[2]) for part in row["classes"].split()) == len(own)
    made = assemble(classed, out, str(tmp_path / "set"))
    assert len(list((made / "class_masks").iterdir())) == 8 + 9


def test_tables_of_classes_that_differ_are_refused(classed, tmp_path):
    others = cell_classes.named(["small", "other"])
    flags = save_segmenter(tmp_path / "segmenter.pt", others)
    with pytest.raises(ValueError, match=r"SPLIT .*split has other classes of nuclei \(1 small, 2 large\) than"):
        make("pseudo", classed, 2, *flags)
    assert not (tmp_path / "pseudo").exists()
    out, _ = make("unseen", classed, 2)
    cell_classes.write_classes(out, others)
    with pytest.raises(ValueError, match="--results_path .*unseen has nuclei of other classes than unseen: give"):
        make("unseen", classed, 3)
    with pytest.raises(ValueError, match="split and .*unseen have not the same classes of cells by their classes.json"):
        assemble(classed, out, str(tmp_path / "set"))
    assert not (tmp_path / "set").exists() and len(list((out / "samples").iterdir())) == 2
    with pytest.raises(ValueError, match="--results_path .*unseen has nuclei of other classes than pseudo: give"):
        make("pseudo", classed, 3, *save_segmenter(tmp_path / "plain.pt", []), name="unseen")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gan split", "unknown KIND gan"),
        ("unseen split --model_path m.pt", "unseen with --model_path m.pt"),
        ("pseudo split", "pseudo with --model_path None"),
        ("unseen data", "SPLIT data has no seen/"),
        ("unseen all", "SPLIT all has no unlabelled/"),
        ("unseen split --count 0", "--count 0 must lie in"),
    ],
)
def test_mistakes(split, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    subset_slides.main(["data", "all", "--subsample", "1", "--val_share", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: rival_samples.main(["--count", "2", *words.split(), "--results_path", "out"]))
    assert stop.value.code == 2 and message in capsys.readouterr().err and not Path("out").exists()
