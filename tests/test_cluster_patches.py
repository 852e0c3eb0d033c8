"""The command: every folder it makes is a data set, the same again is the same, and every mistake is one line."""

import csv
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import write_patches
from PIL import Image

from guided_diffusion.conditioning import ConditionSpec
from guided_diffusion.histology.features.embeddings import Features, save_features
from guided_diffusion.image_datasets import load_dataset
from scripts import cluster_patches

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = "MoNuSegTrainingData", "MoNuSegTestData"
SPEC = ConditionSpec(num_classes=6, use_hv_map=True, use_col_map=True)
KMEANS = "--reduce none --cluster kmeans --n_clusters 2 --out_name C".split()


@pytest.fixture
def data(tmp_path):
    """24 training and 4 test patches; of every four the first has one vector, the others another."""
    write_patches(tmp_path / "data" / TRAIN, count=24, size=16)
    write_patches(tmp_path / "data" / TEST, count=4, size=16, first=100)
    return tmp_path / "data"


@pytest.fixture
def features(data, tmp_path):
    paths = sorted(path.relative_to(data).as_posix() for path in data.glob("*/images/*.png"))
    rng = np.random.default_rng(0)
    vectors = np.stack([[9.0 * path.endswith("_000.png"), 0, 0, 0] for path in paths]) + rng.normal(
        0, 0.3, (len(paths), 4)
    )
    made = Features(vectors.astype(np.float32), paths, [Path(path).stem for path in paths], "stain", "none")
    save_features(tmp_path / "f.npz", made)
    return tmp_path / "f.npz"


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_clusters_of_one_slide_are_named(capsys):
    patches = [cluster_patches.Patch(TRAIN, str(k), "abc"[k % 3], {}) for k in range(9)]
    cluster_patches.warn_of_lopsided(["0" if patch.slide == "a" else "1" for patch in patches], patches)
    assert capsys.readouterr().out.splitlines()[1:] == ["WARNING: 0 is of slide a alone"]
    cluster_patches.warn_of_lopsided([patch.slide for patch in patches], patches)
    assert not capsys.readouterr().out


def load(folder, is_train=True):
    return load_dataset(data_dir=str(folder), dataset_mode="monuseg", image_size=16, spec=SPEC, is_train=is_train)


def test_every_folder_is_a_data_set(data, features, capsys):
    cluster_patches.main([str(data), "--features", str(features), *KMEANS, "--subset", "50,25"])
    assert "holds 75% of the training patches: fine-tuning on it repeats pretraining" in capsys.readouterr().out
    folder = data / "C"
    labels = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert labels == ["0", "1"]
    sizes = {label: (len(load(folder / label)), len(load(folder / label, is_train=False))) for label in labels}
    assert sorted(sizes.values()) == [(6, 1), (18, 3)]
    for label, (train, test) in sizes.items():
        for name, part in (("50ss", train // 2), ("25ss", train // 2 // 2)):
            assert (len(load(folder / label / name)), len(load(folder / label / name, is_train=False))) == (part, test)
    scores = json.loads((folder / "scores.json").read_text())
    assert {(size["train"], size["test"]) for size in scores["sizes"].values()} == set(sizes.values())
    assert scores["silhouette"] > 0.8 and scores["noise_share"] == {"train": 0.0, "test": 0.0}
    rows = list(csv.DictReader((folder / "clusters.csv").open()))
    assert len(rows) == 28 and {row["label"] for row in rows if row["path"].endswith("_000.png")} != set(labels)
    with Image.open(folder / "clusters.png") as picture:
        assert picture.width > 1000
    assert len(load(data)) == 24  # and so is still what it lies in


def test_finetune_takes_the_parent(data, features, tmp_path):
    """Also where a label has no training patch, and so no folder for it."""
    cluster_patches.main([str(data), "--cluster", "slide"])
    (tmp_path / "model.pt").write_bytes(b"")
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    ended = subprocess.run(
        ["bash", str(ROOT / "scripts" / "finetune.sh"), str(data / "names_6_1"), str(tmp_path / "model.pt")],
        env={**os.environ, "PYTHON": str(echo), "OUT": str(tmp_path / "out"), "NPROC": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.startswith("cluster ")] == [
        f"cluster slide-{i} ({i + 1} of 6)" for i in range(6)
    ]
    assert (data / "names_6_1" / "slide-25" / TEST).is_dir() and not (data / "names_6_1" / "slide-25" / TRAIN).exists()
    assert len(load(data / "names_6_1" / "slide-3")) == 4


def test_again_is_the_same_and_other_settings_replace(data, features):
    command = [str(data), "--features", str(features), *KMEANS]
    cluster_patches.main([*command, "--subset", "50"])
    before = tree(data / "C")
    cluster_patches.main([*command, "--subset", "50"])
    assert tree(data / "C") == before
    cluster_patches.main([*command, "--n_clusters", "3"])
    names = {name.split("/")[0] for name in tree(data / "C")}
    assert names == {*"012", "clusters.csv", "scores.json", "clusters.png", "links.json"}
    assert not list((data / "C").rglob("50ss"))
    (data / "C" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt is there but not by this command"):
        cluster_patches.main(command)


def test_paths_may_be_relative(data, features, monkeypatch):
    monkeypatch.chdir(data.parent)
    cluster_patches.main(["data", "--features", "f.npz", *KMEANS])
    assert all(path.exists() for path in (data / "C").rglob("*")) and len(load(data / "C" / "0")) in (6, 18)


def test_copies(data, features):
    cluster_patches.main([str(data), "--features", str(features), *KMEANS, "--copy", "True", "--subset", "50"])
    assert not any(path.is_symlink() for path in (data / "C").rglob("*")) and len(load(data / "C" / "0" / "50ss")) > 2


def test_hdbscan_and_trials(data, features):
    flags = "--cluster hdbscan --n_components 2 --min_samples 2 --min_cluster_size 4 --trials 3 --seed 7".split()
    cluster_patches.main([str(data), "--features", str(features), *flags])
    (folder,) = data.glob("__stain*")
    assert folder.name == "__stain_pca_n_components_2_random_state_7_hdbscan_min_samples_2_min_cluster_size_4_v1.0"
    scores = json.loads((folder / "scores.json").read_text())
    assert [trial["seed"] for trial in scores["trials"]] == [7, 8, 9] and scores["seed"] == 7
    assert (folder / "-1").is_dir() == (scores["noise_share"]["train"] + scores["noise_share"]["test"] > 0)


@pytest.mark.parametrize(
    "flags, name",
    [
        (
            ["--reduce", "umap", "--cluster", "hdbscan"],
            "__efficientnet_lite0_umap_n_components_3_random_state_42_hdbscan_min_samples_10_min_cluster_size_50_v1.0",
        ),
        (["--reduce", "none", "--cluster", "gmm"], "__efficientnet_lite0_none_gmm_n_clusters_6_random_state_42_v1.0"),
    ],
)
def test_default_name_is_the_references(flags, name):
    args = cluster_patches.create_argparser().parse_args(["DATA", "--features", "f.npz", *flags])
    options, _ = cluster_patches.check(args)
    made = Features(np.zeros((0, 1), np.float32), [], [], "efficientnet_lite0", "0")
    assert cluster_patches.default_name(args, options, made, []) == name


@pytest.mark.parametrize(
    "backbone, name", [("sdm:/a/b/model000001.pt@50", "sdm_model000001.pt_50"), ("hf:org/vit", "hf_vit")]
)
def test_default_name_has_no_path_in_it(backbone, name):
    args = cluster_patches.create_argparser().parse_args(["DATA", "--features", "f.npz"])
    made = Features(np.zeros((0, 1), np.float32), [], [], backbone, "0")
    assert cluster_patches.default_name(args, cluster_patches.check(args)[0], made, []).startswith(f"__{name}_pca_")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cluster", "kmeans", "--n_clusters", "25"], "--n_clusters 25 needs 25 training patches, there are 24"),
        (["--cluster", "hdbscan"], "--min_cluster_size 50 needs 50 training patches, there are 24"),
        (["--reduce", "tsne"], "unknown --reduce 'tsne'"),
        (["--cluster", "birch"], "unknown --cluster 'birch'"),
        (["--features", "none.npz"], "--features none.npz is not a file"),
        (["--trials", "0"], "--trials 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--subset", "25,x"], "--subset 25,x does not parse"),
        (["--subset", "0"], "--subset 0 does not parse"),
        (["--out_name", "../C"], "--out_name ../C is no name"),
        (["--out_name", TEST], "--out_name MoNuSegTestData is no name"),
        (
            ["--cluster", "hdbscan", "--n_clusters", "5"],
            "--cluster hdbscan makes no use of --n_clusters 5: leave it out",
        ),
        (["--cluster", "gmm", "--min_samples", "5"], "--cluster gmm makes no use of --min_samples 5"),
        (["--reduce", "none", "--n_components", "2"], "--reduce none makes no use of --n_components 2"),
        (["--cluster", "slide"], "--cluster slide makes no use of --features .*f.npz: leave it out"),
    ],
)
def test_a_mistake_writes_nothing(data, features, flags, message):
    before = tree(data)
    with pytest.raises((ValueError, OSError), match=message):
        cluster_patches.main([str(data), "--features", str(features), *flags])
    assert tree(data) == before


def test_a_folder_that_was_not_prepared_to_the_end_is_refused(data):
    (data / "prepare.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match=r"^DATA .*data is not prepared to the end: run prepare_monuseg.py again$"):
        cluster_patches.main([str(data), "--cluster", "slide"])


def test_a_reduction_is_not_for_slides(data):
    with pytest.raises(ValueError, match="--cluster slide makes no use of --reduce none: leave it out"):
        cluster_patches.main([str(data), "--cluster", "slide", "--reduce", "none"])


def test_features_of_other_images_name_the_first(data, features, tmp_path):
    made = cluster_patches.load_features(features)
    keep = [i for i, stem in enumerate(made.stems) if stem not in ("slide-1_002", "slide-3_000")]
    save_features(
        features,
        Features(made.features[keep], [made.paths[i] for i in keep], [made.stems[i] for i in keep], "stain", "none"),
    )
    with pytest.raises(ValueError, match="--features has no row for .*slide-1_002.png"):
        cluster_patches.main([str(data), "--features", str(features), *KMEANS])
    assert not (data / "C").exists()


def test_features_are_needed_but_for_slides(data):
    with pytest.raises(ValueError, match="--cluster kmeans needs --features"):
        cluster_patches.main([str(data), *KMEANS])


def test_a_folder_of_another_program_is_refused(data, features):
    (data / "C").mkdir()
    (data / "C" / "scores.json").write_text("{}")
    with pytest.raises(ValueError, match="scores.json is there but not by this command"):
        cluster_patches.main([str(data), "--features", str(features), *KMEANS])
