"""The logger, by what it leaves in its files and on stdout."""

import csv
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion import logger

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean_state(monkeypatch, tmp_path):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system_tmp"))
    logger.reset()
    yield
    logger.reset()


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_before_configure_stdout_only(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger.log("hello", 1, None)
    logger.logkv("loss", 0.5)
    logger.logimage("grid", np.zeros((2, 2, 3), np.uint8), 0)
    assert logger.dumpkvs() == {"loss": 0.5}
    assert logger.get_dir() is None
    out = capsys.readouterr().out
    assert out.startswith("hello 1 None\n")
    assert re.search(r"^loss +0.5$", out, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_all_formats_write_their_files(capsys, tmp_path):
    folder = tmp_path / "a" / "run"
    logger.configure(str(folder), ["stdout", "log", "csv", "json", "tensorboard"])
    assert logger.get_dir() == str(folder)
    logger.log("training")
    logger.logkvs({"step": 3, "loss": 1 / 3, "note": 'a "b", c', "nothing": None})
    logger.logimage("grid", np.full((4, 5, 3), 7, np.uint8), 3)
    returned = logger.dumpkvs()
    logger.warn("careful")
    logger.close()
    assert returned == {"step": 3, "loss": 1 / 3, "note": 'a "b", c', "nothing": None}
    assert names(folder) == ["log.txt", "progress.csv", "progress.json", "tb"]
    text = (folder / "log.txt").read_text()
    assert text == capsys.readouterr().out
    assert text.startswith(f"logging to {folder}\ntraining\n---")
    assert text.endswith("---\nWARNING: careful\n")
    assert read_csv(folder / "progress.csv") == [
        {"step": "3", "loss": "0.3333333333333333", "note": 'a "b", c', "nothing": ""}
    ]
    assert [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()] == [returned]


def tensorboard_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_content(tmp_path):
    logger.configure(str(tmp_path), ["tensorboard"])
    logger.logkvs({"step": 40, "loss": 0.25, "note": "text"})
    logger.dumpkvs()
    logger.logkv("loss", 0.125)
    logger.dumpkvs()  # no step: the number of the dump
    logger.logkvs({"mode": "train", "step": 41, "loss": 0.5})
    logger.dumpkvs()
    logger.logkvs({"mode": "val", "step": 41, "val_loss": 0.75})
    logger.dumpkvs()
    with logger.prefix("val"):
        logger.logimage("grid", np.full((4, 5, 3), 7, np.uint8), 40)
    events = tensorboard_events(tmp_path / "tb")  # before close: everything is flushed
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(40, 0.25), (1, 0.125)]
    assert [(e.step, e.value) for tag in ("train_loss", "val_loss") for e in events.Scalars(tag)] == [
        (41, 0.5),
        (41, 0.75),
    ]
    assert sorted(events.Tags()["scalars"]) == ["loss", "train_loss", "val_loss"]
    (image,) = events.Images("val_grid")
    assert (image.step, image.width, image.height) == (40, 5, 4)


def test_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        logger.configure(str(tmp_path / "run"), ["log", "tensorboard"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)])
def test_bad_image(array):
    with pytest.raises(ValueError, match=r"'grid'.*H x W x 3"):
        logger.logimage("grid", array, 0)


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", " json, log,json")
    logger.configure()
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert names(tmp_path / "env") == ["log.txt", "progress.json"]
    assert (tmp_path / "env" / "progress.json").read_text() == '{"a": 1}\n'
    logger.configure(str(tmp_path / "argument"), ["csv"], log_suffix="-b")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert names(tmp_path / "argument") == ["progress-b.csv"]


def test_default_folder_and_formats(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "")
    folders = []
    for _ in range(2):
        logger.configure()
        logger.logkv("a", 1)
        logger.dumpkvs()
        folders.append(Path(logger.get_dir()))
        assert folders[-1].parent == Path(tempfile.gettempdir())
        assert re.fullmatch(r"openai-\d{4}-\d\d-\d\d-.*", folders[-1].name)
        assert names(folders[-1]) == ["log.txt", "progress.csv"]
        assert str(folders[-1]) in capsys.readouterr().out
    assert folders[0] != folders[1]


def test_unknown_format(monkeypatch, tmp_path):
    logger.configure(str(tmp_path / "old"), ["log"])
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout,tensorbored")
    message = r"OPENAI_LOG_FORMAT: unknown format 'tensorbored'; choose from stdout, log, csv, json, tensorboard"
    with pytest.raises(ValueError, match=message):
        logger.configure(str(tmp_path / "new"))
    with pytest.raises(ValueError, match="format_strs: unknown format 'xml'"):
        logger.configure(str(tmp_path / "new"), ["xml"])
    logger.log("still here")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "log.txt").read_text().endswith("still here\n")


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=r"run is a file; set OPENAI_LOGDIR"):
        logger.configure(str(tmp_path / "run"))


def test_means_and_overwriting():
    for value in (1, 2.0, np.float32(6), None):
        logger.logkv_mean("mean", value)
    logger.logkv("last", 1)
    logger.logkv("last", 2)
    assert logger.getkvs() == {"mean": 3.0, "last": 2}
    logger.getkvs().clear()
    assert logger.dumpkvs() == {"mean": 3.0, "last": 2}
    assert logger.getkvs() == logger.dumpkvs() == {}
    logger.logkv_mean("mean", 5)
    assert logger.dumpkvs() == {"mean": 5.0}


def test_an_empty_dump_writes_nothing(capsys, tmp_path):
    logger.configure(str(tmp_path), ["csv", "stdout"])
    capsys.readouterr()
    logger.dumpkvs()
    assert capsys.readouterr().out == ""
    assert not names(tmp_path)


def test_scalars_of_other_libraries(tmp_path):
    logger.configure(str(tmp_path), ["json"])
    logger.logkv("numpy", np.float64(0.1))
    logger.logkv("int", np.int32(4))
    logger.logkv("array", np.array([2.5]))
    logger.logkv("tensor", th.tensor(1.5, requires_grad=True))
    logger.logkv_mean("bf16", th.tensor([3.0], dtype=th.bfloat16))
    logger.logkv("nan", float("nan"))
    dumped = logger.dumpkvs()
    assert math.isnan(dumped.pop("nan"))
    assert dumped == {"numpy": 0.1, "int": 4, "array": 2.5, "tensor": 1.5, "bf16": 3.0}
    assert {type(value) for value in dumped.values()} == {int, float}
    assert json.loads((tmp_path / "progress.json").read_text()) == {**dumped, "nan": None}
    for value in (th.zeros(2), np.zeros(2), [1.0]):
        with pytest.raises(ValueError, match="'bad'"):
            logger.logkv("bad", value)


def test_prefix():
    with logger.prefix("val"):
        logger.logkv("loss", 1)
        logger.logkv_mean("mse", 2)
        with logger.prefix("q0"):
            logger.logkvs({"loss": 3})
    logger.logkv("loss", 4)
    with pytest.raises(KeyError), logger.prefix("val"):
        raise KeyError
    logger.logkv("step", 5)
    assert logger.dumpkvs() == {"val_loss": 1, "val_mse": 2, "val_q0_loss": 3, "loss": 4, "step": 5}


def test_csv_grows_new_columns(tmp_path):
    logger.configure(str(tmp_path), ["csv"])
    logger.logkvs({"step": 0, "loss": 0.1})
    logger.dumpkvs()
    logger.logkvs({"val_loss": 0.2, "step": 1, "note": "a\nb,c"})
    logger.dumpkvs()
    logger.logkvs({"loss": 0.3, "step": 2})
    logger.dumpkvs()
    assert read_csv(tmp_path / "progress.csv") == [
        {"step": "0", "loss": "0.1", "val_loss": "", "note": ""},
        {"step": "1", "loss": "", "val_loss": "0.2", "note": "a\nb,c"},
        {"step": "2", "loss": "0.3", "val_loss": "", "note": ""},
    ]
    assert names(tmp_path) == ["progress.csv"]


def test_a_restart_appends(tmp_path):
    for step, keys in enumerate((["loss"], ["mse", "loss"], ["mse"])):
        logger.configure(str(tmp_path), ["csv", "json", "log"])
        logger.logkv("step", step)
        logger.logkvs(dict.fromkeys(keys, step + 0.5))
        logger.dumpkvs()
    rows = read_csv(tmp_path / "progress.csv")
    assert [(row["step"], row["loss"], row["mse"]) for row in rows] == [
        ("0", "0.5", ""),
        ("1", "1.5", "1.5"),
        ("2", "", "2.5"),
    ]
    assert len((tmp_path / "progress.json").read_text().splitlines()) == 3
    assert (tmp_path / "log.txt").read_text().count("logging to") == 3


def test_later_steps_are_cut_back(tmp_path):
    """As where a run was killed at step 5, and goes on from its checkpoint of step 3."""
    for first, last in ((1, 5), (4, 6)):
        logger.configure(str(tmp_path), ["csv", "json", "tensorboard"])
        logger.cut_back(first - 1)
        for step in range(first, last + 1):
            logger.logkvs({"step": step, "loss": 10 * first + step, "note": "a\nb"})
            logger.dumpkvs()
        with open(tmp_path / "progress.json", "a") as file:
            file.write('{"st')
    logger.close()
    expected = [(step, 10 + step if step < 4 else 40 + step) for step in range(1, 7)]
    assert [(int(row["step"]), int(row["loss"])) for row in read_csv(tmp_path / "progress.csv")] == expected
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines() if line.endswith("}")]
    assert [(line["step"], line["loss"]) for line in lines] == expected
    seen = tensorboard_events(tmp_path / "tb").Scalars("loss")
    assert [(event.step, event.value) for event in seen] == expected


def test_a_half_written_line_is_ended_first(tmp_path):
    (tmp_path / "progress.csv").write_text("step,loss\n1,0.5\n2")
    (tmp_path / "progress.json").write_text('{"step": 1}\n{"st')
    logger.configure(str(tmp_path), ["csv", "json"])
    for kvs in ({"step": 3, "loss": 0.25}, {"step": 4, "mse": 1}):
        logger.logkvs(kvs)
        logger.dumpkvs()
    assert [row["step"] for row in read_csv(tmp_path / "progress.csv")] == ["1", "2", "3", "4"]
    assert (tmp_path / "progress.json").read_text().splitlines()[1:3] == ['{"st', '{"step": 3, "loss": 0.25}']


def test_other_ranks_write_only_what_went_wrong(capsys, tmp_path):
    folder = tmp_path / "run"
    logger.configure(str(folder), ["stdout", "log", "csv", "tensorboard"], rank=1)
    logger.log("fine")
    logger.logkv("loss", 1)
    logger.logimage("grid", np.zeros((2, 2, 3), np.uint8), 0)
    assert logger.dumpkvs() == {"loss": 1}
    assert not folder.exists()
    logger.warn("hot")
    logger.error("broken")
    assert names(folder) == ["log-rank001.txt"]
    assert (folder / "log-rank001.txt").read_text() == "WARNING: hot\nERROR: broken\n"
    assert capsys.readouterr().out == ""


def test_other_ranks_write_all_where_the_environment_says_so(capsys, tmp_path, monkeypatch):
    """Which rank this is the launcher says; so scripts written against guided-diffusion give none."""
    monkeypatch.setenv("PMI_RANK", "2")
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "log,csv")
    logger.configure(str(tmp_path))
    logger.log("fine")
    logger.logkv("loss", 0.5)
    logger.dumpkvs()
    assert names(tmp_path) == ["log-rank002.txt", "progress-rank002.csv"]
    assert "\nfine\n" in (tmp_path / "log-rank002.txt").read_text()
    assert read_csv(tmp_path / "progress-rank002.csv") == [{"loss": "0.5"}]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("OPENAI_LOG_FORMAT_MPI", "paper")
    with pytest.raises(ValueError, match="OPENAI_LOG_FORMAT_MPI: unknown format 'paper'"):
        logger.configure(str(tmp_path))
    monkeypatch.setenv("PMI_RANK", "0")
    logger.configure(str(tmp_path), ["csv"])
    logger.record_tabular("loss", 1)
    assert logger.dump_tabular() == {"loss": 1} and (tmp_path / "progress.csv").exists()


def test_times(monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(clock))

    @logger.profile("data")
    def read(x):
        return x + 1

    with logger.prefix("val"), logger.profile_kv("data"):
        pass
    assert read(1) == 2
    assert logger.getkvs() == {"val_wait_data": 2.0, "wait_data": 0.5}


def test_levels(capsys):
    logger.debug("d0")
    logger.set_level(logger.DEBUG)
    logger.debug("d1")
    logger.log("i1", level=logger.INFO)
    logger.set_level(logger.ERROR)
    logger.warn("w2")
    logger.error("e2")
    logger.logkv("loss", 1)
    logger.dumpkvs()
    logger.set_level(logger.DISABLED)
    logger.error("e3")
    logger.log("x3", level=logger.DISABLED)
    assert capsys.readouterr().out == "d1\ni1\nERROR: e2\n"


def test_modules_that_warn_by_pythons_logging_keep_to_the_current_level(tmp_path):
    module = logging.getLogger("guided_diffusion.slides")
    logger.set_level(logger.ERROR)
    assert not module.isEnabledFor(logging.WARNING)
    with logger.scoped_configure(str(tmp_path), ["csv"]):
        assert module.isEnabledFor(logging.WARNING)
    assert not module.isEnabledFor(logging.WARNING)
    logger.reset()
    assert module.isEnabledFor(logging.WARNING)


def test_disabled_silences_files_too(tmp_path):
    logger.configure(str(tmp_path), ["csv", "json"])
    logger.set_level(logger.DISABLED)
    logger.logkv("loss", 1)
    assert logger.dumpkvs() == {"loss": 1}
    assert not names(tmp_path)


def test_table(capsys):
    logger.logkvs({"step": 12000, "loss": 0.123456, "small": 1.23456e-7, "k" * 50: "v" * 50})
    logger.dumpkvs()
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == lines[-1] == "-" * len(lines[0])
    assert [line.split() for line in lines[1:-1]] == [
        ["step", "12000"],
        ["loss", "0.1235"],
        ["small", "1.235e-07"],
        ["k" * 29 + "...", "v" * 21 + "..."],
    ]


def test_scoped_configure_restores(capsys, tmp_path):
    logger.configure(str(tmp_path / "outer"), ["log"])
    logger.logkv("outer", 1)
    with pytest.raises(KeyError), logger.scoped_configure(str(tmp_path / "inner"), ["csv"]):
        logger.logkv("inner", 2)
        logger.dumpkvs()
        logger.configure(str(tmp_path / "nested"), ["log"])  # as a main() under test does
        raise KeyError
    assert logger.get_dir() == str(tmp_path / "outer")
    assert logger.dumpkvs() == {"outer": 1}
    assert read_csv(tmp_path / "inner" / "progress.csv") == [{"inner": "2"}]


def test_lines_go_above_tqdm_bars(capsys):
    from tqdm import tqdm

    with tqdm(total=3, file=sys.stdout, ascii=True) as bar:
        bar.update()
        logger.log("between")
        bar.update()
    lines = re.split(r"[\r\n]", capsys.readouterr().out)
    assert "between" in lines


def test_import_is_light_and_touches_nothing(tmp_path):
    code = (
        "import sys; from guided_diffusion import logger; logger.log('hi'); logger.set_level(logger.WARN);"
        "assert not {'torch', 'tensorboard', 'tqdm'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")
    assert not list(tmp_path.iterdir())
