"""The benchmarks run, and their ways compute the same."""

import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch as th
from conftest import TINY as TINY_MODEL
from conftest import write_patches
from PIL import Image

import image_sample
import image_train
from guided_diffusion import checkpoint, cli, logger
from guided_diffusion.script_util import args_to_dict, create_model_and_diffusion, model_and_diffusion_defaults
from scripts.benchmarks import (
    benchmark_loader,
    benchmark_startup,
    benchmark_training,
    measure_fields,
    measure_filter,
    recipes,
)

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "benchmarks"
TINY = ["--config", "tiny", "--batch_size", "2", "--repeats", "1"]


def rows(quick, script, *flags):
    """The cells of a benchmark's first table, by their row's name."""
    command = [quick, FOLDER / script, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.split("\n\n")[0].splitlines() if line[:1] == "|"]
    names = lines[0]
    return {cells[0]: dict(zip(names, cells)) for cells in lines[2:]}, done.stdout


@pytest.mark.slow
def test_sampling(quick):
    table, output = rows(quick, "benchmark_sampling.py", *TINY, "--rounds", "1", "--end_to_end", "2")
    first, *fp32 = [name for name in table if not name.startswith("bfloat16")]
    assert first == "plain float32" and len(fp32) == 4
    assert all(float(table[name]["largest deviation"]) < 1e-5 for name in fp32)
    # Two whole passes are two, however attention is computed; then each saving takes some away.
    plain, ours, shared, cached, last = (float(table[name]["GFLOP an image"]) for name in (first, *fp32))
    assert plain == ours > shared > cached == last > 0
    assert "| unipc | 2 |" in output


@pytest.mark.slow
def test_training(quick):
    table, _ = rows(quick, "benchmark_training.py", *TINY, "--batch_size", "1", "--max_steps", "1")
    assert len(table) >= 5 and all(float(row["s a step"]) > 0 for row in table.values())


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("benchmark_sampling", "--batch_size 0", "--batch_size 0 must be at least 1"),
        ("benchmark_sampling", "--rounds 0", "--rounds 0 must be at least 1"),
        ("benchmark_sampling", "--end_to_end 25 2000", r"--end_to_end 2000 must lie in \[1, 1000\]"),
        ("benchmark_training", "--max_steps 0", "--max_steps 0 must be at least 1"),
        ("benchmark_training", "--batch_size 2 0", "--batch_size 0 must be at least 1"),
        ("benchmark_loader", "--threads 0", "--threads 0 must be at least 1"),
        ("benchmark_loader", "--slides 1 --batch_size 26", r"--batch_size 26 must lie in \[1, 25\]"),
        ("benchmark_loader", "--num_workers 0 -1", "--num_workers -1 must be at least 0"),
        ("benchmark_startup", "--images 0", "--images 0 must be at least 1"),
        ("measure_filter", "DATA --choices 0", "--choices 0 must be at least 1"),
        ("measure_filter", "DATA --sizes 3,x", r"--sizes 3,x: 'x' is no number of slides from 3 to the 4 of DATA"),
        ("measure_filter", "DATA --sizes 5", r"--sizes 5: '5' is no number of slides from 3 to the 4 of DATA"),
        ("compare_samplers", "SAMPLING --s 1.5,3", "give one --model_path, one --s, no --field"),
        ("compare_samplers", "SAMPLING --sampler ddim", "leave out --sampler and --use_ddim"),
        ("compare_samplers", "SAMPLING --guidance_interval 3,1", "--guidance_interval 3,1"),
    ],
)
def test_mistakes_are_told_before_the_work(tmp_path, paths, program, flags, message):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=16)
    inputs = {"DATA": [str(tmp_path / "data")], "SAMPLING": [*paths, *TINY_MODEL]}
    words = [word for text in flags.split() for word in inputs.get(text, [text])]
    with pytest.raises(ValueError, match=message):
        importlib.import_module(f"scripts.benchmarks.{program}").main(words)


def test_training_is_measured_at_a_small_batch_too():
    assert benchmark_training.create_argparser().parse_args([]).batch_size == [2, 8]


@pytest.mark.slow
def test_loader(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_loader, "SLIDE_SIZE", 256)
    benchmark_loader.main("--slides 2 --batch_size 2 --windows 1 --batches 1 --num_workers 0".split())
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[1] for row in table] == ["8 of 128 px", "2 of 256 px"] and all(float(row[3]) > 0 for row in table)


@pytest.mark.slow
def test_startup(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_startup.sys, "executable", str(quick))
    monkeypatch.setattr(benchmark_startup, "SLIDE_SIZE", 256)
    benchmark_startup.main(["--folder", str(tmp_path), *"--images 40 --num_workers 0 --batch_size 2".split()])
    first, _, _, *table = [line for line in capsys.readouterr().out.splitlines() if "assumed" not in line]
    assert "40 images without masks: the first step ends" in first and len(table) == 10
    with pytest.raises(ValueError, match="holds 40 images already: give --images 40 or more"):
        benchmark_startup.main(["--folder", str(tmp_path), "--images", "39"])


@pytest.fixture
def paths(data_dir, tmp_path) -> list[str]:
    """Flags of data and a model."""
    args = image_sample.create_argparser().parse_args(TINY_MODEL)
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults()))
    generator = th.Generator().manual_seed(0)
    for p in model.parameters():  # of which some begin as zeros
        p.data.add_(0.05 * th.randn(p.shape, generator=generator))
    checkpoint.save(model.state_dict(), str(tmp_path), "model000001.pt")
    return ["--data_dir", str(data_dir), "--model_path", str(tmp_path / "model000001.pt"), "--use_train", "True"]


@pytest.mark.slow
def test_samplers(paths, quick):
    flags = [
        *TINY_MODEL,
        "--num_samples",
        "3",
        "--batch_size",
        "2",
        "--diffusion_steps",
        "4",
        "--num_steps",
        "3",
        "--s",
        "3",
    ]
    table, _ = rows(quick, "compare_samplers.py", *paths, *flags)
    assert len(table) == 6 and table["ddpm, 4 steps, again"]["over the chain's own"] == "1.00"
    other, _ = rows(quick, "compare_samplers.py", *paths, *flags, "--guidance_interval", "1e8,1e9")
    assert other.keys() == table.keys() and other != table


@pytest.mark.slow
def test_fields(paths, quick, tmp_path):
    flags = [*TINY_MODEL, "--num_samples", "2", "--timestep_respacing", "2", "--field", "True"]
    pattern = ["--model_path", str(tmp_path / "model*.pt")]
    image_sample.main([*paths, *flags, *pattern, "--results_path", str(tmp_path / "runs/out")])
    out = str(tmp_path / "runs/out")
    table, output = rows(quick, "measure_fields.py", out, "--side", "24", "--memory", "64")
    assert len(table) == 2 and all(row["px"] == "32 x 32" for row in table.values())
    assert output.count("largest difference") == 2 and "| 64 | 49 |" in output
    shutil.copytree(out, tmp_path / "runs/other", symlinks=True)
    for flags, message in {
        "--memory x": "--memory x: 'x' is not a number of px",
        "--memory 15": "--side 32 and --memory 15 must be at least a window's 16 px",
        "--side 15": "--side 15 and --memory 256,1024 must be at least a window's 16 px",
    }.items():
        with pytest.raises(ValueError, match=message):
            measure_fields.main([out, *flags.split()])
    with pytest.raises(ValueError, match="holds 2 folders of samples: give one of them"):
        measure_fields.main([str(tmp_path / "runs")])


@pytest.mark.slow
def test_filter(tmp_path, capsys):
    write_patches(tmp_path / "data" / "MoNuSegTrainingData", count=16)
    measure_filter.main([str(tmp_path / "data"), "--sizes", "3,4", "--choices", "2"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["3", "3", "mean", "4", "4", "mean"]
    values = [[float(value) for value in line[1:]] for line in lines]
    assert all(len(row) == 4 + len(measure_filter.PLANTS) and 0 <= min(row) <= max(row) <= 1 for row in values)
    blur, noise = (list(measure_filter.PLANTS).index(name) for name in ("blur", "noise"))
    assert values[5][4 + blur] > 0.9 and values[5][4 + noise] > 0.9


def recipe_rows():
    figures = {"x": [(5, 0.4, 0.3), (20, 0.2, 0.1)], "v": [(5, 0.1, 0.1), (20, 0.1, 0.05)]}
    rest = dict(f1=0.5, auroc=0.9, f1_real=0.6)
    return [
        dict(recipe=name, seed=seed, minutes=mark, steps=100 * mark, kid=kid + seed / 100, colour_od=colour, **rest)
        for name, marks in figures.items()
        for mark, kid, colour in marks
        for seed in (0, 1)
    ]


def test_recipes_are_summed_up(tmp_path):
    recipes.write_rows(tmp_path, recipe_rows())
    lines = recipes.as_markdown(recipes.read_rows(tmp_path)).splitlines()
    assert lines[0] == "After 5 / 20 minutes:"
    assert [line.split(" | ")[:5] for line in lines[4:]] == [
        ["| x", "2", "2000", "0.405 / 0.205", "0.300 / 0.100"],
        ["| v", "2", "2000", "0.105 / 0.105", "0.100 / 0.050"],
    ]
    # v has after 5 minutes what x has after 20; x itself at its last mark.
    assert [line.split(" | ")[-1] for line in lines[4:]] == ["20 |", "5 |"]
    # Rows that were read and rows that are new are of the same seeds.
    new = recipe_rows()
    mixed = [recipes.read_rows(tmp_path)[0], *new[1:]]
    assert recipes.means(mixed, "x", "kid") == recipes.means(new, "x", "kid") != {}


def marks_alone(run):
    figures = dict(kid=0.1, colour_od=0.1, f1=0.5, auroc=0.9, f1_real=0.6)
    return [dict(recipe=run.recipe, seed=run.seed, minutes=at, steps=n, **figures) for at, n in run.marks.items()]


def test_only_the_marks_that_are_missing_are_measured(tmp_path, monkeypatch):
    prepared = []
    stand_ins = dict(find_slides=str, prepare=lambda *words: prepared.append(words[2]), train_and_measure=marks_alone)
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(recipes, name, stand_in)
    (tmp_path / "costs.csv").write_text("recipe,seconds\n" + "".join(f"{name},2\n" for name in recipes.RECIPES))
    asked = [str(tmp_path), str(tmp_path), "--recipes", "x,v", "--seeds", "0", "--minutes", "5,10"]
    old = [{**row, "steps": 30 * row["minutes"]} for row in recipe_rows() if row["recipe"] == "x"]
    stale = [{**old[0], "recipe": "v", "steps": 149, "kid": 9}]  # of before v's steps were timed anew
    recipes.write_rows(tmp_path, [*old, *stale])
    recipes.main(asked)
    assert prepared == [[("x", 0), ("v", 0)]]
    rows = recipes.read_rows(tmp_path)
    recipes.main(asked)
    assert len(prepared) == 1 and recipes.read_rows(tmp_path) == rows  # all is there
    assert recipes.as_markdown(rows) == (tmp_path / "recipes.md").read_text()
    assert Image.open(tmp_path / "recipes.png").size == (1100, 770)
    assert [(row["recipe"], float(row["minutes"]), row["steps"]) for row in rows[4:]] == [
        ("x", 10, "300"),
        ("v", 5, "150"),
        ("v", 10, "300"),
    ]
    (of_v,) = [line for line in recipes.as_markdown(rows).splitlines() if line.startswith("| v")]
    assert of_v.split(" | ")[3] == "0.100 / 0.100 / -"
    (of_x,) = [line for line in recipes.as_markdown(rows).splitlines() if line.startswith("| x")]
    assert of_x.split(" | ")[3].split(" / ")[1] == "-"  # after 10 minutes one of its two seeds alone was measured


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipes x,y", "unknown --recipes y: choose some of eps, "),
        ("--seeds 0,one", "--seeds 0,one: 'one' is not a number"),
        ("--minutes 5,nan", "--minutes 5,nan: 'nan' is not a number"),
        ("--minutes 0", "--minutes and --jobs must be above 0"),
        ("--jobs 0", "--minutes and --jobs must be above 0"),
        ("", "RAW: found no slides"),
    ],
)
def test_mistakes_in_what_recipes_are_to_do(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        recipes.main([str(tmp_path), str(tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


def test_an_earlier_mark_is_trained_for_anew(tmp_path, monkeypatch):
    """What was measured after so many steps stays; a model that is past a mark cannot go back to it."""
    model, called = tmp_path / "runs/x-s0/model", []

    def call(log, script, *words, **more):
        step = int(words[-1])
        assert script == "image_train.py" and all(int(path.stem[5:]) <= step for path in model.glob("*.pt"))
        called.append(step)
        (model / f"model{step:06d}.pt").write_text("")
        (model / "result.json").write_text('{"checkpoint": "M"}')

    monkeypatch.setattr(recipes, "call", call)
    monkeypatch.setattr(recipes, "measure", lambda run, checkpoint, folder: {"kid": called[-1] / 1000})
    for marks, steps in (({5.0: 100, 20.0: 400}, [100, 400]), ({5.0: 100, 10.0: 200}, [200]), ({5.0: 101}, [101])):
        called.clear()
        rows = recipes.train_and_measure(recipes.Run("x", 0, marks, tmp_path))
        assert called == steps and [row["steps"] for row in rows] == list(marks.values())
        assert [row["kid"] for row in rows] == [count / 1000 for count in marks.values()]


def test_equal_minutes_are_the_more_steps_the_less_a_step_costs(data_dir, tmp_path, monkeypatch):
    """The step that is timed is image_train.py's; what a file says counts, for times of one machine alone compare."""
    (tmp_path / "many-s0").mkdir()
    (tmp_path / "many-s0/seen").symlink_to(data_dir)
    monkeypatch.setattr(recipes, "MODEL", " ".join(TINY_MODEL))
    monkeypatch.setattr(recipes, "TRAINING", "--batch_size 2")
    best = "v+spade32+min_snr"
    monkeypatch.setattr(recipes, "RECIPES", {name: recipes.RECIPES[name] for name in (best, "few")})
    for place, name in ((logger, "set_level"), (th, "set_num_threads"), (recipes, "keep_memory")):
        monkeypatch.setattr(place, name, lambda *_: None)  # of the process that costs are measured in
    monkeypatch.setattr(recipes, "ROUNDS", 1)
    found = recipes.measure_costs(tmp_path / "many-s0")
    assert found[best] == found["few"] > 0
    (tmp_path / "costs.csv").write_text(f"recipe,seconds\n{best},0.25\nfew,0.5\n")
    assert recipes.read_costs(tmp_path) == {best: 0.25, "few": 0.5}
    (tmp_path / "costs.csv").write_text(f"recipe,seconds\n{best},0.25\n")
    with pytest.raises(ValueError, match=r"costs\.csv does not say what few costs"):
        recipes.read_costs(tmp_path)


def test_a_failed_program_is_named_with_its_log(tmp_path):
    with pytest.raises(recipes.ProgramFailed, match=r"scripts/summarise_runs\.py failed with exit code 2, see .*log"):
        recipes.call(tmp_path / "log", "scripts/summarise_runs.py")


@pytest.mark.parametrize(("word", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", 143)])
def test_a_run_of_recipes_whose_program_fails_ends_in_one_line(tmp_path, monkeypatch, capfd, word, code):
    """Also where one of the processes that measure has called it."""
    (tmp_path / "fails.py").write_text(f"import os, sys\n{word}\n")
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setattr(recipes, "find_slides", lambda raw: [])
    monkeypatch.setattr(recipes, "prepare", lambda raw, out, wanted: None)
    monkeypatch.setattr(recipes, "train_and_measure", fail)
    (tmp_path / "costs.csv").write_text("recipe,seconds\n" + "".join(f"{name},2\n" for name in recipes.RECIPES))
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: recipes.main([str(tmp_path), str(tmp_path), "--recipes", "x", "--seeds", "0"]))
    said = capfd.readouterr()
    assert stop.value.code == code
    assert said == ("", f"error: fails.py failed with exit code {code}, see {tmp_path / 'train.log'}\n")


def fail(run):
    recipes.call(run.out / "train.log", "fails.py")


def test_recipes_are_the_experiments_but_for_their_flags():
    config = (FOLDER.parent / "experiment" / "experiment_cpu.conf").read_text()
    assert recipes.MODEL.split() == re.search(r"MODEL_FLAGS=\((.*?)\)", config, re.DOTALL)[1].split()
    for recipe in recipes.RECIPES.values():
        image_train.resolve([*recipes.MODEL.split(), *recipes.TRAINING.split(), *recipe.flags.split()])
