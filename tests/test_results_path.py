"""What --results_path may be, and which run it belongs to."""

import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion.results_path import check_outside, check_results_path, check_same_run, claimed

ROOT = Path(__file__).resolve().parents[1]


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="holds images that no sampling run made"):
        check_results_path(str(tmp_path))
    with pytest.raises(ValueError, match="is a URL"):
        check_results_path("gs://bucket/out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        check_results_path(str(tmp_path / "link"))


def test_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="--results_path .* is a file"):
            check_results_path(str(path))
    check_results_path(str(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()


def test_results_do_not_mix_with_appearances(tmp_path):
    (tmp_path / "unannotated").mkdir()
    check_results_path(str(tmp_path / "out"), appearance_dir=str(tmp_path / "unannotated"))
    for path in (tmp_path / "unannotated", tmp_path / "unannotated" / "out"):
        with pytest.raises(ValueError, match=r"--results_path .* lies in --appearance_dir"):
            check_results_path(str(path), appearance_dir=str(tmp_path / "unannotated"))


def test_nothing_is_written_among_what_is_read(tmp_path):
    for folder in ("data/train/images", "slides,a", "more"):
        (tmp_path / folder).mkdir(parents=True)
    data, folders = str(tmp_path / "data"), f"{tmp_path / 'slides,a'}"

    def check(place, images=folders):
        check_outside(str(tmp_path / place), "OPENAI_LOGDIR", data, unlabelled_dir=images)

    for place in ("out", "data/out", "more"):
        check(place)
    for place in ("data", "data/train", "data/train/images/run"):
        with pytest.raises(ValueError, match="OPENAI_LOGDIR .* lies among the images of --data_dir"):
            check(place)
    for place in ("slides,a", "slides,a/run"):
        with pytest.raises(ValueError, match="OPENAI_LOGDIR .* lies in --unlabelled_dir .*slides,a: give another"):
            check(place)
    with pytest.raises(ValueError, match="lies in --unlabelled_dir .*more"):
        check("more/run", f"{tmp_path / 'elsewhere'},{tmp_path / 'more'}")


OLDER = {"a_later_flag": "", "window_overlap": 0.5, "loss_weights": "none"}  # what flags stand for that a run has not


def begin(path, run, overwrite=False):
    with claimed(path, run, OLDER, overwrite):
        pass


def test_another_run_is_refused_by_name(tmp_path):
    path = str(tmp_path / "out")
    check_same_run(path, {"s": "1.5"}, {})
    begin(path, {"s": "1.5", "seed": 0})
    check_same_run(path, {"s": "1.5", "seed": 0}, {})
    with pytest.raises(ValueError, match="begun with --s 1.5, this run has 1.6"):
        begin(path, {"s": "1.6", "seed": 0})
    begin(path, {"s": "1.5", "seed": 0, "a_later_flag": ""})
    with pytest.raises(ValueError, match="begun with --a_later_flag , this run has on"):
        begin(path, {"s": "1.5", "seed": 0, "a_later_flag": "on"})
    begin(path, {"s": "1.5", "seed": 0, "a_later_flag": "", "mpp": 0.25})
    with pytest.raises(ValueError, match="begun with --mpp 0.25, this run has 0.5"):
        begin(path, {"s": "1.5", "seed": 0, "a_later_flag": "", "mpp": 0.5})
    begin(path, {"s": "1.5", "seed": 0, "a_later_flag": "", "mpp": 0.25, "window_overlap": 0.5})  # its default
    with pytest.raises(ValueError, match="begun with --window_overlap 0.5, this run has 0.3"):
        begin(path, {"s": "1.5", "seed": 0, "a_later_flag": "", "mpp": 0.25, "window_overlap": 0.3})
    now = {"s": "1.5", "seed": 0, "a_later_flag": "", "mpp": 0.25, "window_overlap": 0.5, "loss_weights": "none"}
    begin(path, now)
    begin(path, {"s": "1.6"}, overwrite=True)
    check_same_run(path, {"s": "1.6"}, {})
    Path(path, "run.json").write_text("{")
    with pytest.raises(ValueError, match="does not parse"):
        check_same_run(path, {}, {})
    Path(path, "run.json").unlink()
    Path(path, "manifest.csv").write_text("")
    with pytest.raises(ValueError, match="unknown run"):
        check_same_run(path, {}, {})


def test_a_folder_in_use_is_left_alone(tmp_path):
    """Even by one who would overwrite it."""
    begin(tmp_path / "out", {"s": "1"})
    before = (tmp_path / "out" / "run.json").read_bytes()
    second = (
        "import sys; from guided_diffusion.results_path import claimed\nwith claimed(sys.argv[1], {}, {}, True): pass"
    )
    with claimed(str(tmp_path / "out"), {"s": "1"}, {}):
        result = subprocess.run(
            [sys.executable, "-c", second, tmp_path / "out"], cwd=ROOT, capture_output=True, text=True
        )
    assert f"--results_path {tmp_path / 'out'} is in use by process" in result.stderr
    assert (tmp_path / "out" / "run.json").read_bytes() == before
