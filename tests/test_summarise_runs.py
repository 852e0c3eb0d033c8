"""The table of training runs: a row of each, and runs that have not ended or did not write what is read."""

import json

import pytest

from scripts import summarise_runs

RESULT = {"images": 3, "step": 10, "best": {"val_loss": 0.5}, "checkpoint": "model000010.pt"}


def run(folder, text):
    folder.mkdir()
    (folder / "result.json").write_text(text)
    return f"a={folder}"


def test_a_row_of_each_run(tmp_path):
    word = run(tmp_path / "b=c", json.dumps(RESULT))
    summarise_runs.main([str(tmp_path / "out.csv"), word])
    assert (tmp_path / "out.csv").read_text().splitlines()[1].startswith("a,3,10,0.5,model000010.pt")


@pytest.mark.parametrize("text", ["", "[]", "{}", 100_000 * "[", json.dumps({**RESULT, "best": 1})])
def test_a_result_that_no_training_wrote(tmp_path, text):
    with pytest.raises(ValueError, match=r"result.json is not what image_train.py wrote: run it again"):
        summarise_runs.main([str(tmp_path / "out.csv"), run(tmp_path / "a", text)])
    assert not (tmp_path / "out.csv").exists()


def test_a_run_that_has_not_ended(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not come to its end"):
        summarise_runs.main([str(tmp_path / "out.csv"), f"a={tmp_path}"])
