"""Results folders: found, named, and refused where they are not whole."""

import pytest
from PIL import Image

from guided_diffusion.histology.evaluation import runs


def write_run(path, stems=("b", "a"), appearance=True):
    for name in ("samples", "inst_masks", "images"):
        (path / name).mkdir(parents=True)
    for stem in stems:
        Image.new("RGB", (4, 4)).save(path / "samples" / f"{stem}.png")
        Image.new("I;16", (4, 4)).save(path / "inst_masks" / f"{stem}.tif")
        if appearance:
            Image.new("RGB", (4, 4)).save(path / "images" / f"{stem}.png")
    rows = [f"{i},{stem},data/{stem}_000.png,1.5" for i, stem in enumerate(stems)]
    (path / "manifest.csv").write_text("\n".join(["index,stem,structure,s", *rows, "9,cut"]) + "\n")
    return path


def test_a_run_in_the_order_of_stems_with_its_rows(tmp_path):
    (run,) = runs.find_runs([write_run(tmp_path / "run")])
    assert run.name == "run" and [sample.stem for sample in run.samples] == ["a", "b"]
    sample = run.samples[0]
    assert sample.row == {"index": "1", "stem": "a", "structure": "data/a_000.png", "s": "1.5"}
    assert sample.inst_mask == tmp_path / "run" / "inst_masks" / "a.tif" and sample.appearance.name == "a.png"


def test_without_appearances_or_manifest(tmp_path):
    (write_run(tmp_path / "run", appearance=False) / "manifest.csv").unlink()
    (run,) = runs.find_runs([tmp_path / "run"])
    assert [(sample.appearance, sample.row) for sample in run.samples] == [(None, {})] * 2


def test_pictures_that_no_row_tells_of_are_no_samples(tmp_path, capsys):
    """A run was killed between the two, and another one is in its place."""
    path = write_run(tmp_path / "run")
    for part, suffix in (("samples", ".png"), ("inst_masks", ".tif")):
        (path / part / f"b{suffix}").rename(path / part / f"c{suffix}")
    (run,) = runs.find_runs([path])
    assert [sample.stem for sample in run.samples] == ["a"]
    assert capsys.readouterr().err == f"WARNING: {path}: 1 pictures that manifest.csv does not name are left out\n"


def test_a_sweep_and_equal_names(tmp_path):
    for name in ("sweep/m_s1", "sweep/m_s2", "x/kept", "y/kept"):
        write_run(tmp_path / name)
    write_run(tmp_path / "sweep" / ".kept.77.part")  # of a run that was killed
    found = runs.find_runs([tmp_path / "sweep", tmp_path / "x" / "kept", tmp_path / "y" / "kept"])
    assert [run.name for run in found] == ["m_s1", "m_s2", "x_kept", "y_kept"]


def no_samples(path):
    for file in (path / "samples").iterdir():
        file.unlink()


def no_mask(path):
    (path / "inst_masks" / "a.tif").unlink()


def dead_link(path):
    (path / "inst_masks" / "a.tif").unlink()
    (path / "inst_masks" / "a.tif").symlink_to("gone.tif")


def huge_field(path):
    with open(path / "manifest.csv", "a") as file:
        file.write(f"{200_000 * 'x'}\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_samples, r"samples holds no \.png: sample first"),
        (no_mask, r"a\.png has no mask .*a\.tif"),
        (huge_field, r"manifest\.csv is no readable table"),
        (dead_link, r"a\.tif is a link that leads nowhere"),
    ],
)
def test_runs_that_are_not_whole(tmp_path, damage, message):
    damage(write_run(tmp_path / "run"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runs.find_runs([tmp_path / "run"])


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (("none", "none is not a folder"), ("empty", "empty has no samples/, nor a folder")):
        with pytest.raises(FileNotFoundError, match=message):
            runs.find_runs([tmp_path / folder])
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="run is named twice"):
        runs.find_runs([run, run])
