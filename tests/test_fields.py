"""Fields from the command line: each structure whole, at its own size."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_patch, write_images
from forked import start_ranks
from PIL import Image
from test_image_sample import assert_same, flags, manifest, model_path, pixels, run, snapshot  # noqa: F401

import image_sample
from guided_diffusion.results import FOLDERS

SHAPES = [(16, 16), (24, 33), (40, 17), (20, 20)]  # height and width


def write_fields(folder: Path, shapes=SHAPES) -> Path:
    """Instance masks of these sizes; :return: the folder."""
    folder.mkdir(parents=True)
    for k, (height, width) in enumerate(shapes):
        inst = draw_patch(k, 64)[1][20 : 20 + height, 20 : 20 + width]
        Image.fromarray(inst).save(folder / f"field_{k}.tif")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Flags for fields of several sizes, with the colours of images of another size."""
    write_images(tmp_path / "colours", count=3, size=12)
    paths = ["--structure_dir", str(write_fields(tmp_path / "masks")), "--appearance_dir", str(tmp_path / "colours")]
    return [*paths, "--data_dir", "", "--min_nucleus", "0", "--field", "True", "--first", "True", "--num_samples", "4"]


def test_fields_of_several_sizes(folders, model_path, tmp_path, capsys):  # noqa: F811
    """Files of the masks' own sizes, of the appearances' own; the same command goes on; scales share a run."""
    out = run("", model_path, tmp_path / "out", *folders, "--s", "1,1.5", "--same_noise", "True")
    whole = snapshot(out)
    for s in ("1", "1.5"):
        folder = out / f"model000007_s{s}"
        for row, (height, width) in zip(manifest(folder), SHAPES, strict=True):
            mask = np.asarray(Image.open(row["structure"]))
            assert mask.shape == (height, width) == pixels(folder, row["stem"]).shape[:2]
            assert np.array_equal(np.asarray(Image.open(folder / "inst_masks" / f"{row['stem']}.tif")), mask)
            assert Image.open(folder / "cond" / f"{row['stem']}.png").size == (4 * width, height)
            assert Image.open(folder / "images" / f"{row['stem']}.png").size == (12, 12)
        assert (folder / "grid.png").is_file()
    for path in [*(out / "model000007_s1").glob("samples/*")][1:3]:
        path.unlink()
    run("", model_path, out, *folders, "--s", "1,1.5", "--same_noise", "True", "--batch_size", "7")
    assert_same(snapshot(out), whole)


def test_fields_of_one_window_are_patches(data_dir, model_path, tmp_path):  # noqa: F811
    """To the last bit of every file."""
    for folder in data_dir.glob("*/*"):
        for path in folder.iterdir():
            Image.fromarray(np.asarray(Image.open(path))[8:24, 8:24]).save(path)
    flags = ["--s", "1.5", "--num_samples", "5", "--match_struct", "True"]
    patches = run(data_dir, model_path, tmp_path / "patches", *flags)
    fields = run(data_dir, model_path, tmp_path / "fields", *flags, "--field", "True")
    wrote = [{name: data for name, data in snapshot(out).items() if name != "run.json"} for out in (patches, fields)]
    assert wrote[0] == wrote[1] and len(wrote[0]) == 5 * len(FOLDERS) + 2


@pytest.mark.parametrize("cache", ["off", "on"])
def test_neither_cache_nor_flips_ask_for_one_size(data_dir, model_path, tmp_path, cache):  # noqa: F811
    """Patches of 32 px as fields with their own images, whose nuclei's colours are kept; by a weaker model."""
    flags = ["--field", "True", "--window_overlap", "0.3", "--s", "2", "--num_samples", "2", "--augment", "True"]
    flags += ["--guide_path", model_path]
    out = run(data_dir, model_path, tmp_path / cache, *flags, "--preserve_nuclei_col", "True", "--spade_cache", cache)
    assert all(pixels(out, row["stem"]).shape == (32, 32, 3) for row in manifest(out))


@pytest.mark.slow
def test_ranks_share_fields(folders, model_path, tmp_path):  # noqa: F811
    one = run("", model_path, tmp_path / "one", *folders)
    command = flags("", model_path, tmp_path / "two", *folders)
    assert [rank.wait() for rank in start_ranks(2, image_sample.main, command, tmp_path / "log")] == [0, 0]
    two = {name: data for name, data in snapshot(tmp_path / "two").items() if name != "run.json"}
    assert_same(two, {name: data for name, data in snapshot(one).items() if name != "run.json"})


def test_dry_run_says_what_a_field_costs(data_dir, model_path, tmp_path, capsys):  # noqa: F811
    run(data_dir, model_path, tmp_path / "out", "--dry_run", "True", "--field", "True")
    cost = json.loads(capsys.readouterr().out)["denoiser_calls_a_pixel"]
    assert cost["16 px"] == 4 and 4 * 3 < cost["128 px"] < 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--window_overlap", "1"], r"--window_overlap 1.0 must lie in \[0, 1\)"),
        (["--field", "False", "--window_overlap", "0.2"], "--window_overlap 0.2 without --field True: nothing reads"),
    ],
)
def test_mistakes(folders, model_path, tmp_path, change, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run("", model_path, tmp_path / "out", *folders, *change)


def test_colours_by_nuclei_are_refused_before_the_first_sample(folders, model_path, tmp_path):  # noqa: F811
    """One of the appearances is of the first field's size, and none of the others'; nothing is written."""
    command = [*folders, "--preserve_nuclei_col", "True", "--num_samples"]
    for path in (tmp_path / "colours").iterdir():
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"--preserve_nuclei_col True .*field_1.tif, and .*png is of another size"):
        run("", model_path, tmp_path / "out", *command, "4")
    assert not (tmp_path / "out").exists()
    assert len(manifest(run("", model_path, tmp_path / "out", *command, "1"))) == 1
    for path in (tmp_path / "colours").iterdir():
        Image.fromarray(np.zeros((24, 33, 3), np.uint8)).save(path)
    (tmp_path / "masks/field_0.tif").unlink()
    with pytest.raises(ValueError, match="field_1.tif, and .*png is turned otherwise"):
        run("", model_path, tmp_path / "other", *command, "1", "--augment", "True")
    assert len(manifest(run("", model_path, tmp_path / "other", *command, "1"))) == 1


def test_structures_smaller_than_a_window_are_refused(folders, model_path, tmp_path):  # noqa: F811
    Image.fromarray(np.zeros((40, 15), np.int32)).save(tmp_path / "masks" / "small.tif")
    with pytest.raises(ValueError, match=r"small.tif is 15 x 40 px, smaller than --image_size 16"):
        run("", model_path, tmp_path / "out", *folders)
    assert not (tmp_path / "out" / "samples").exists()
