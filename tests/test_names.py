"""File names that no manifest can hold are refused by every program that lists files, and odd ones that it can work."""

import csv
import os
import unicodedata
from pathlib import Path

import pytest
import torch as th
from conftest import TINY, write_patches
from test_evaluate import write_run

import image_sample
import image_train
from guided_diffusion import checkpoint, cli, logger
from guided_diffusion.files import nfc
from guided_diffusion.histology.features.embeddings import load_features
from guided_diffusion.histology.segmenter import data as segmenter_data
from guided_diffusion.histology.segmenter.decoding import as_content
from guided_diffusion.histology.segmenter.net import seeded_net
from guided_diffusion.histology.slides.toy import write_toy_monuseg
from guided_diffusion.images import list_items
from guided_diffusion.script_util import args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.sweep import find_checkpoints
from scripts import (
    assemble_set,
    cluster_patches,
    evaluate,
    export_set,
    extract_features,
    filter_ood,
    import_dataset,
    prepare_monuseg,
    segment,
    summarise_runs,
    train_segmenter,
)
from scripts.experiment import subset_slides
from scripts.workflow import stage

TRAIN = "MoNuSegTrainingData"
DATA = ("data/MoNuSegTrainingData/images", "data/MoNuSegTrainingData/inst_masks")
SAMPLES = ("run/samples", "run/inst_masks")
SAMPLE = [
    *"--data_dir data --use_train True --batch_size 12".split(),
    *TINY,
    "--model_path",
    "model/model000001.pt",
    "--results_path",
    "out",
    "--timestep_respacing",
    "2",
]
EVALUATE = "--real data --synthetic run --out out --metrics colour".split()
# Program, its arguments, and the folders that hold a file of a bad name.
CALLS = {
    "image_train": (image_train, ["--data_dir", "data", *TINY, "--max_steps", "1"], DATA),
    "image_sample": (image_sample, SAMPLE, DATA),
    "image_sample, appearances": (image_sample, [*SAMPLE, "--appearance_dir", "plain"], ("plain",)),
    "cluster_patches": (cluster_patches, ["data", "--cluster", "slide"], DATA),
    "extract_features": (extract_features, "data --backbone stain --out f.npz".split(), DATA),
    "extract_features, plain": (extract_features, "plain --backbone stain --out f.npz".split(), ("plain",)),
    "import_dataset": (import_dataset, "foreign out --num_workers 1".split(), ("foreign/images", "foreign/masks")),
    "prepare_monuseg": (prepare_monuseg, "raw out --workers 1".split(), ("raw/MoNuSegTestData",)),
    "evaluate": (evaluate, EVALUATE, DATA),
    "evaluate, samples": (evaluate, EVALUATE, SAMPLES),
    "evaluate, masks": (evaluate, f"--predicted {DATA[1]} --truth {DATA[1]} --out out".split(), DATA[1:]),
    "train_segmenter": (train_segmenter, "data --out out --steps 1".split(), DATA),
    "segment": (segment, f"segmenter.pt {DATA[0]} --out out".split(), DATA[:1]),
    "filter_ood": (filter_ood, "--real data --synthetic run --out out --backbone stain".split(), DATA),
    "filter_ood, samples": (filter_ood, "--real data --synthetic run --out out --backbone stain".split(), SAMPLES),
    "assemble_set": (assemble_set, "--real data --synthetic run --out out --ratio 1".split(), DATA),
    "assemble_set, samples": (assemble_set, "--real data --synthetic run --out out --ratio 1".split(), SAMPLES),
    "export_set": (export_set, "data export --format coco --num_workers 1".split(), DATA),
    "export_set, samples": (export_set, "run export --format coco --num_workers 1".split(), SAMPLES),
    "subset_slides": (subset_slides, "data out --percent 50".split(), DATA),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a diffusion model and a segmenter, of chance weights."""
    folder = tmp_path_factory.mktemp("models")
    args = image_sample.create_argparser().parse_args(TINY)
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    checkpoint.save(model.state_dict(), str(folder), "model000001.pt")
    th.save(as_content(seeded_net(), [], []), folder / "segmenter.pt")
    return folder


@pytest.fixture
def inputs(tmp_path, monkeypatch, models) -> Path:
    """All that the calls read, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_LOGDIR", "log")
    write_patches(tmp_path / "data" / TRAIN, count=12, bin_masks=False)
    write_patches(tmp_path / "data" / "MoNuSegTestData", count=4, first=100, bin_masks=False)
    write_run(tmp_path / "run", count=4)
    (tmp_path / "plain").symlink_to(DATA[0])
    (tmp_path / "foreign").mkdir()
    for name, folder in zip(("images", "masks"), DATA):
        (tmp_path / "foreign" / name).symlink_to(tmp_path / folder)
    (tmp_path / "model").symlink_to(models)
    (tmp_path / "segmenter.pt").symlink_to(models / "segmenter.pt")
    return tmp_path


def rename(folders: tuple[str, ...], name: bytes) -> None:
    """Give the first file of each folder another name."""
    for folder in folders:
        path = min(Path(folder).iterdir())
        path.rename(path.with_name(os.fsdecode(name) + path.suffix))


def everything(folder: Path) -> list[str]:
    return sorted(map(str, folder.rglob("*")))


@pytest.mark.parametrize("call", CALLS)
def test_a_name_that_no_line_can_hold_is_refused_at_once(inputs, capsys, call):
    """Other such names: test_files."""
    program, arguments, folders = CALLS[call]
    if program is prepare_monuseg:
        write_toy_monuseg(inputs / "raw", 1, 1, 64, 0)
    rename(folders, b"Pr\xe4parat_000")
    before = everything(inputs)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: program.main(arguments))
    logger.close()
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and error.endswith(": rename it")
    assert "Pr\\xe4parat_000." in error
    assert everything(inputs) == before


def read_csv(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_names_that_a_line_can_hold_work(inputs):
    """Commas, quotes, blanks and letters of any alphabet, from the patch to the set that is made of its samples."""
    write_patches(inputs / "data" / TRAIN, count=12, size=16, bin_masks=False)
    odd = ("a, b", 'c "d"', "é ü", "組織", "# 'e' ; $f_{$", "[x]*?", "<b>&amp;", "`id` $(id) | \\", "{f} %d ~")
    names = [f"{name}_000" for name in odd]
    for folder in DATA:
        for path, name in zip(sorted(Path(folder).iterdir()), names):
            path.rename(path.with_name(name + path.suffix))
    for path in Path(DATA[0]).iterdir():  # as macOS spells é and ü
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    image_sample.main([*SAMPLE, "--num_samples", "0"])
    stems = {row["stem"] for row in read_csv("out/manifest.csv")}
    assert set(names) < stems and {path.stem for path in Path("out/samples").iterdir()} == stems
    assemble_set.main("--real data --synthetic out --out set --ratio 1".split())
    rows = read_csv("set/manifest.csv")
    assert len(rows) == 24 and {nfc(Path(row["structure"]).stem) for row in rows} == stems
    cluster_patches.main(["data", "--cluster", "slide", "--out_name", "clusters"])
    extract_features.main("data --backbone stain --out f.npz".split())
    odd_run = Path("$x_{$ [1], <b>")
    Path("out").rename(odd_run)
    evaluate.main([*"--real data --out figures --metrics colour --synthetic".split(), str(odd_run)])


def test_sub_folders_from_end_to_end(inputs):
    """Patches of equal names lie in two sub-folders; what is made of them keeps these apart."""
    data = inputs / "data" / TRAIN
    for folder in ("images", "inst_masks"):
        for path in sorted((data / folder).iterdir()):
            path.unlink()
    for name in ("a", "b"):
        write_patches(data / name, count=4, size=16, first=4 * (name == "b"), bin_masks=False)
        for folder in ("images", "inst_masks"):
            (data / name / folder).rename(data / folder / name)
            for path in (data / folder / name).iterdir():
                path.rename(path.with_name(path.name.replace("slide-1", "slide-0")))
        (data / name).rmdir()
    image_sample.main([*SAMPLE, "--num_samples", "0"])
    rows = read_csv("out/manifest.csv")
    assert sorted(row["structure"] for row in rows) == sorted(
        f"data/{TRAIN}/images/{n}/slide-0_00{k}.png" for n in "ab" for k in range(4)
    )
    assert len({row["stem"] for row in rows}) == 8 == len(list(Path("out/samples").iterdir()))
    assemble_set.main("--real data --synthetic out --out set --ratio 1".split())
    extract_features.main("set --backbone stain --out f.npz".split())
    assert len(load_features("f.npz").paths) == 16 + 4
    cluster_patches.main(["set", "--cluster", "slide", "--out_name", "clusters"])
    subset_slides.main("set subset --percent 100".split())
    for made in ("set", "set/clusters/slide-0", "subset"):
        folder = inputs / made / TRAIN / "images"
        found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        assert found[:8] == [f"{name}/slide-0_00{k}.png" for name in "ab" for k in range(4)] and len(found) == 16
        assert len(list_items(str(inputs / made), "monuseg")) == 16
    assert len(segmenter_data.training_pairs(inputs / "set")) == 16


@pytest.mark.parametrize("name", ["run[1]", "a, b", "a,b[2]", "$x *", "c=d"])
def test_brackets_commas_and_equals_signs_of_a_folder_are_its_own(tmp_path, monkeypatch, name):
    """For patterns of checkpoints, for the engine's stages, and in the summary of runs."""
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    paths = [f"{name}/ema_0.9_{step:06d}.pt" for step in (1, 2)]
    for path in paths:
        Path(path).touch()
    assert find_checkpoints(f"{name}/ema_*.pt") == paths and find_checkpoints(paths[0]) == paths[:1]
    assert stage.find(name) == [Path(name)]
    if "," not in name:
        assert find_checkpoints(",".join(paths)) == paths
    Path(name, "result.json").write_text('{"images": 3, "step": 2, "best": {}, "checkpoint": "m.pt"}')
    summarise_runs.main(["out.csv", f"{name}={name}"])
    assert [row["cluster"] for row in read_csv("out.csv")] == [name]
