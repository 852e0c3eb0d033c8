"""filter_ood.py from end to end: what it keeps, what it writes, and what it refuses without a trace."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from conftest import draw_patch, write_patches
from PIL import Image
from test_evaluate import write_fields, write_run

from guided_diffusion import cell_classes, cli, slides
from guided_diffusion.files import csv_text
from guided_diffusion.histology.evaluation import instance_metrics
from guided_diffusion.histology.evaluation.runs import find_runs
from guided_diffusion.histology.features import backbones
from guided_diffusion.histology.filtering import comparison
from guided_diffusion.histology.segmenter.decoding import as_content, load_segmenter
from guided_diffusion.histology.segmenter.net import seeded_net
from guided_diffusion.results import FOLDERS
from scripts import assemble_set, filter_ood

TRAIN = "MoNuSegTrainingData"


class Pooled:
    """A backbone without a network: colours and edges, averaged over squares of 2 and 4 px."""

    name, weight_hash = "pooled", "none"

    def __init__(self, broken=False):
        self.broken = broken

    def maps(self, images):
        x = th.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        joint = th.cat([x, (x - F.avg_pool2d(x, 3, 1, 1)).abs()], 1)
        fine = F.avg_pool2d(joint, 2)
        if self.broken:
            fine[-1, 0, 0, 0] = th.nan
        return [fine, F.avg_pool2d(joint, 4)]


@pytest.fixture
def pooled(monkeypatch):
    monkeypatch.setattr(filter_ood, "load_backbone", lambda *_: Pooled())


@pytest.fixture(autouse=True)
def inputs(tmp_path, monkeypatch):
    """data/ with 4 slides of 4 patches, and sweep/ of two runs, the second one's first three samples being noise."""
    monkeypatch.chdir(tmp_path)
    write_patches(tmp_path / "data" / TRAIN, count=16)
    for i, s in enumerate(("1", "2")):
        write_run(tmp_path / "sweep" / f"m_s{s}", count=5, s=s, first=50 + 20 * i)
    for k in range(3):
        noise = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"sweep/m_s2/samples/s{k}_000.png")


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def run(*flags, out="out", synthetic=("sweep",), real="data"):
    filter_ood.main(["--data_dir", str(real), "--synthetic", *synthetic, "--results_path", out, *map(str, flags)])
    report = json.loads(Path(out, "report.json").read_text())
    return report, read_csv(Path(out, "scores.csv"))


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_what_is_written(capsys):
    report, rows = run()
    scores = np.array([float(row["score"]) for row in rows])
    kept = np.array([row["kept"] == "True" for row in rows])
    assert len(rows) == report["synthetic"] == 10 and report["kept"] == kept.sum() == report["kept_share"] * 10
    assert np.array_equal(kept, scores <= report["threshold"])
    worst = {rows[i]["path"] for i in np.argsort(scores)[-3:]}
    assert worst == {f"../sweep/m_s2/samples/s{k}_000.png" for k in range(3)}
    assert sum(float(row["weight"]) for row in rows) == pytest.approx(1)
    assert report["weight_hash"] == backbones.load_backbone("efficientnet_lite0", th.device("cpu")).weight_hash
    assert report["of_unknown_slides"] == 0
    del report["real"]["scores"]
    assert report["real"] == {"patches": 16, "slides": 4, "folds": 4, "bank": 24}
    assert 0.5 < report["auroc"] <= 1 and list(report["runs"]) == ["m_s1", "m_s2"]
    assert report["settings"]["tau"] == 0.95
    with Image.open("out/ood.png") as picture:
        assert min(picture.size) > 300
    assert capsys.readouterr().out.startswith(f"out: kept {kept.sum()} of 10, threshold")


def test_kept_is_a_results_folder(pooled):
    _, rows = run("--mode", "top_n", "--top_n", 6)
    lowest = sorted(rows, key=lambda row: float(row["score"]))[:6]
    found = read_csv("out/kept/manifest.csv")
    assert {row["stem"] for row in found} == {f"{row['run']}__{row['stem']}" for row in lowest}
    for name in FOLDERS:
        assert {path.stem for path in Path("out/kept", name).iterdir()} == {row["stem"] for row in found}
    scores = {f"{row['run']}__{row['stem']}": row for row in rows}
    for row in found:
        assert row["score"] == scores[row["stem"]]["score"] and row["weight"] == scores[row["stem"]]["weight"]
        assert row["s"] == row["run"].removeprefix("m_s") and row["structure"].startswith("data/slide-")
        link = Path("out/kept/samples", f"{row['stem']}.png")
        assert link.is_symlink() and not link.readlink().is_absolute()
    (again,) = find_runs([Path("out/kept")])
    assert len(again.samples) == 6 and all(item.row["score"] for item in again.samples)
    arguments = "--data_dir data --synthetic out/kept --results_path set --ratio 0.25 --weighted True"
    assemble_set.main(arguments.split())
    made = [row for row in read_csv("set/manifest.csv") if row["source"] == "synthetic"]
    assert len(made) == 4 and all(float(row["score"]) > 0 and row["checkpoint"] for row in made)


def test_what_is_kept_keeps_its_classes(pooled, tmp_path):
    """Where all runs have them; the table, too, which lies with the sweep."""
    for name in ("m_s1", "m_s2"):
        shutil.copytree(f"sweep/{name}", f"deep/sweep/{name}")
        shutil.copytree(f"sweep/{name}/labels", f"deep/sweep/{name}/class_masks")
    cell_classes.write_classes(tmp_path / "deep/sweep", cell_classes.named(["nucleus"]))
    run("--mode", "top_n", "--top_n", 6, synthetic=["deep/sweep"])
    stems = {path.stem for path in Path("out/kept/samples").iterdir()}
    assert {path.stem for path in Path("out/kept/class_masks").iterdir()} == stems
    assert [one.name for one in cell_classes.read_classes("out/kept")] == ["nucleus"]
    run("--mode", "top_n", "--top_n", 6, synthetic=["deep/sweep/m_s1", "sweep/m_s2"])
    assert not Path("out/kept/class_masks").exists() and not Path("out/kept/classes.json").exists()


def test_useful_is_what_looks_real_and_a_segmenter_half_finds(pooled):
    net = seeded_net()
    with th.no_grad():
        net.head.weight[:4] *= 30  # of chance weights, it says nucleus in many places
    th.save(as_content(net, []), "segmenter.pt")
    segmenter = load_segmenter("segmenter.pt", th.device("cpu"))
    _, before = run("--tau", 0.99)
    real = [row["kept"] == "True" for row in before]
    agreement = []
    for row in before:
        files = (
            Path("sweep", row["run"], "samples", f"{row['stem']}.png"),
            Path("sweep", row["run"], "inst_masks", f"{row['stem']}.tif"),
        )
        image, truth = (np.asarray(Image.open(file)) for file in files)
        agreement.append(instance_metrics.measure(truth, segmenter.segment(image))["aji"])
    low, high = np.quantile(np.array(agreement)[real], (0.3, 0.7))
    _, rows = run("--tau", 0.99, "--mode", "useful", "--model_path", "segmenter.pt", "--useful_bounds", f"{low},{high}")
    expected = [looks and low <= agrees <= high for looks, agrees in zip(real, agreement)]
    assert [row["kept"] == "True" for row in rows] == expected and 0 < sum(expected) < sum(real) < 10
    assert [row["agreement"] for row in rows] == [str(a) if looks else "" for a, looks in zip(agreement, real)]


def test_one_run_keeps_its_stems_and_weights_are_the_formula(pooled):
    _, rows = run("--mode", "weights", "--quantile", 0.5, synthetic=["sweep/m_s1"])
    scores, weight = (np.array([float(row[name]) for row in rows]) for name in ("score", "weight"))
    assert np.allclose(weight, comparison.weights(scores, 0.5), atol=1e-12)
    assert [row["kept"] == "True" for row in rows] == (weight > 0).tolist() and (weight > 0).sum() == 2
    kept = read_csv("out/kept/manifest.csv")
    assert {row["stem"] for row in kept} <= {f"s{k}_000" for k in range(5)}
    assert [row["stem"] for row in kept] == [row["sample"] for row in kept]


def test_batches_runs_and_their_order_do_not_matter(pooled):
    def scores(rows):
        return {(row["run"], row["stem"]): float(row["score"]) for row in rows}

    flags = ("--reweight", "True", "--batch_size")
    report, rows = run(*flags, 1)
    other, others = run(*flags, 7, synthetic=["sweep/m_s2", "sweep/m_s1"], out="other")
    assert scores(rows) == pytest.approx(scores(others), rel=1e-4)
    assert report["threshold"] == pytest.approx(other["threshold"], rel=1e-4)


def test_a_field_scores_as_the_mean_of_its_patches(pooled, tmp_path):
    write_fields(tmp_path / "fields", [(2, 2), (1, 1)], first=70)
    _, fields = run(synthetic=["fields"], out="a")
    write_run(tmp_path / "patches", count=5, first=70)
    table = tmp_path / "patches" / "manifest.csv"
    rows = read_csv(table)
    for k, row in enumerate(rows):  # of the slides of the field that each is a part of
        row |= dict(structure=f"data/slide-{k // 4}_000.png", appearance=f"data/slide-{k // 4}_001.png")
    table.write_text(csv_text(rows[0], rows))
    _, patches = run(synthetic=["patches"], out="b")
    scores = [float(row["score"]) for row in patches]
    assert [float(row["score"]) for row in fields] == pytest.approx([np.mean(scores[:4]), scores[4]])


def test_a_plain_folder_of_images_is_real_too():
    assert filter_ood.find_real(Path("data", TRAIN, "images")) == filter_ood.find_real(Path("data"))


def test_a_second_run_replaces_its_own_files_only_and_repeats_what_was_killed(pooled):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("keep")
    run("--mode", "top_n", "--top_n", 7)
    run("--mode", "top_n", "--top_n", 2)
    first = snapshot(Path("out"))
    assert len(list(Path("out/kept/samples").iterdir())) == 2 and first["notes.txt"] == b"keep"
    assert {path.name for path in Path("out").iterdir()} == {
        *("kept", "notes.txt", "ood.png", "report.json", "scores.csv")
    }
    for name in ("report.json", "ood.png", "scores.csv"):
        Path("out", name).unlink()
    run("--mode", "top_n", "--top_n", 2)
    assert snapshot(Path("out")) == first


def empty():
    shutil.rmtree("sweep/m_s1/samples")
    Path("sweep/m_s1/samples").mkdir()


def no_mask():
    Path("sweep/m_s2/inst_masks/s1_000.tif").unlink()


def broken_link():
    Path("sweep/m_s2/samples/s1_000.png").unlink()
    Path("sweep/m_s2/samples/s1_000.png").symlink_to("nowhere.png")


def broken_real():
    Path(f"data/{TRAIN}/images/slide-0_000.png").unlink()
    Path(f"data/{TRAIN}/images/slide-0_000.png").symlink_to("nowhere.png")


def cut_off():
    path = Path("sweep/m_s2/samples/s1_000.png")
    path.write_bytes(path.read_bytes()[:-40])


def one_slide():
    for path in Path("data").rglob("slide-[123]_*"):
        path.unlink()
    slides.write_table(Path("data"), [(path.name, "slide-0") for path in Path("data").rglob("slide-0_*.png")])


def two_slides():
    for path in Path("data").rglob("slide-[23]_*"):
        path.unlink()
    manifest = Path("sweep/m_s1/manifest.csv")
    manifest.write_text(manifest.read_text().replace("data/slide-0_001.png", "data/slide-1_001.png"))


def no_training():
    shutil.rmtree(f"data/{TRAIN}")


def small_sample():
    Image.fromarray(draw_patch(0, 16)[0]).save("sweep/m_s2/samples/s1_000.png")


def foreign():
    Path("out/kept").mkdir(parents=True)


def file():
    Path("out").touch()


def half_prepared():
    Path("data/prepare.json").write_text('{"complete": false}')


CASES = [
    (half_prepared, "", "--data_dir data is not prepared to the end: run prepare_monuseg.py again"),
    (empty, "", "samples holds no .png"),
    (no_mask, "", "s1_000.png has no mask"),
    (broken_link, "", "s1_000.png is a link that leads nowhere"),
    (broken_real, "", "slide-0_000.png is gone, or a link that leads nowhere"),
    (cut_off, "", "s1_000.png cannot be decoded"),
    (one_slide, "", "patches of 1 slide (slide-0)"),
    (two_slides, "", "s0_000.png is made of slides slide-0 and slide-1, and --data_dir data has no other"),
    (no_training, "", "--data_dir data holds no image"),
    (small_sample, "", "s1_000.png is 16 x 16 px"),
    (foreign, "", "kept/ that is not of this command"),
    (file, "", "--results_path out: out is a file"),
    (None, "--results_path sweep/m_s1/out", "lies in the input"),
    (None, "--results_path data", "lies in the input"),
    (None, "--synthetic data", "data has no samples/"),
    (None, "--synthetic missing", "missing is not a folder"),
    (None, "--data_dir missing", "--data_dir missing is not a folder"),
    (None, "--backbone other", "unknown --backbone 'other'"),
    (None, "--backbone stain", "stain has no feature maps"),
    (None, "--backbone sdm:nowhere.pt", "nowhere.pt is not a file"),
    (None, "--mode best", "unknown --mode best"),
    (None, "--mode useful", "--mode useful with --model_path None"),
    (None, "--mode useful --model_path none.pt", "there is no file none.pt"),
    (None, "--mode useful --model_path none.pt --useful_bounds 0.5", "--useful_bounds 0.5: give two numbers"),
    (None, "--mode top_n", "--mode top_n with --top_n None"),
    (None, "--top_n 3", "--mode threshold with --top_n 3"),
    (None, "--mode top_n --top_n 0", "--top_n 0 must be at least 1"),
    (None, "--mode top_n --top_n 11", "--top_n 11 is more than the 10 samples"),
    (None, "--val_share 1", "--val_share 1.0 must lie in"),
    (None, "--fraction 0", "--fraction 0.0 must lie in"),
    (None, "--tau 1.5", "--tau 1.5 must lie"),
    (None, "--quantile nan", "--quantile nan must lie"),
    (None, "--batch_size 0", "--batch_size 0"),
    (None, "--neighbourhood 4", "--neighbourhood 4"),
    (None, "--stride 0", "--stride 0"),
    (None, "--seed -1", "--seed -1"),
    (None, "--device nowhere", "--device nowhere"),
    (None, "--bogus 1", "bogus"),
]


@pytest.mark.parametrize(("damage", "flags", "message"), CASES)
def test_bad_input_leaves_no_trace(tmp_path, capsys, damage, flags, message):
    if damage:
        damage()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.run(
            lambda: filter_ood.main(
                ["--data_dir", "data", "--synthetic", "sweep", "--results_path", "out", *flags.split()]
            )
        )
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and said[-1].startswith("error: ") and message in said[-1]
    assert snapshot(tmp_path) == before


def test_features_that_are_not_finite_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(filter_ood, "load_backbone", lambda *_: Pooled(broken=True))
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"features of data/.*_003.png are not finite"):
        run()
    assert snapshot(tmp_path) == before
