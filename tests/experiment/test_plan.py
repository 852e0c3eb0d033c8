"""What each share of the experiment comes to, of the settings as they are shipped."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scripts.experiment import plan

CONFIGS = sorted(Path(plan.__file__).parent.glob("*.conf"))
SETTINGS = (*plan.SETTINGS, "CLUSTER", "BACKBONE", "RATES", "RATES_OF")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """30 training slides of MoNuSeg's size, and a test slide."""
    folder = tmp_path_factory.mktemp("raw")
    for split, numbers in (("MoNuSegTrainingData", range(30)), ("MoNuSegTestData", [30])):
        for name in ("images", "inst_masks"):
            (folder / split / name).mkdir(parents=True)
            for number in numbers:
                Image.new("1", (1000, 1000)).save(folder / split / name / f"slide-{number:02d}.png")
    return folder


@pytest.fixture
def shipped(monkeypatch):
    """:return: a function that puts the settings of a configuration into the environment."""

    def settle(config=CONFIGS[0]):
        words = " ".join([*(f'"${name}"' for name in SETTINGS), *(f'"${{{name}_FLAGS[*]}}"' for name in plan.FLAGS)])
        lines = " ".join(f'"$(printf \'%s\\n\' "${{{name}[@]}}")"' for name in ("GRID", "VARIANTS"))
        script = f'set -eu; source {config}; printf "%s\\0" {words} {lines}'
        values = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
        names = (*SETTINGS, *(f"SDM_{name}_FLAGS" for name in plan.FLAGS), "SDM_GRID", "SDM_VARIANTS")
        for name, value in zip(names, values):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("NPROC", "1")
        monkeypatch.delenv("CELLS", raising=False)

    settle()
    return settle


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_what_is_shipped_can_be_trained(raw, shipped, config, tmp_path, capsys):
    shipped(config)
    assert "--predict_v True" in os.environ["SDM_MODEL_FLAGS"]
    plan.main([str(raw), str(tmp_path)])
    printed = capsys.readouterr().out
    facts = json.loads((tmp_path / "grid.json").read_text())
    assert facts["cells"] and facts["baselines"][0] == "jitter" and f"for {len(facts['cells'])} cells" in printed
    assert all(f"{name}: {title}" in printed for name, title in facts["variants"].items())


@pytest.mark.parametrize("processes", [1, 8])
def test_what_a_cell_comes_to(raw, shipped, monkeypatch, capsys, tmp_path, processes):
    monkeypatch.setenv("NPROC", str(processes))
    monkeypatch.setenv("SDM_GRID", "masks 10 0-2 real,jitter\nslides 100 0 all\npatches 5 0 real,ratio1")
    monkeypatch.setenv("SDM_VARIANTS", "real:\njitter: jitter\nratio1: ratio=1")
    monkeypatch.setenv("RATES", "model=0.36 sample=36 segmenter=0.036 filter=99")
    plan.main([str(raw), str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"{processes} process(es), each with {32 // processes} of 32 patches a step" in printed
    rows = [row.strip("| ").split(" | ") for row in printed.splitlines()[3:6]]
    # 64 patches a slide; of three slides one is held out. 8000 steps of segmenters, at 0.036 s, are 0.08 hours.
    assert rows[0] == ["masks", "10 %", "3", "3", "1", "128", "128", "1728", "2000", "500", "real, jitter", "0.08"]
    # 20000 steps of the model are 2 hours, 1664 samples 16.64, and 12000 steps of segmenters 0.12.
    assert rows[1][:-2] == ["slides", "100 %", "1", "30", "4", "1664", "1664", "0", "20000", "385"]
    assert rows[1][-1] == "19"
    # Of a cluster, a sixth of the patches that are not held out, a twentieth; the model sees all of these.
    assert rows[2][3:8] == ["30", "4", "14", "1664", "0"]


def test_settings_that_decide_figures(raw, shipped, monkeypatch, tmp_path):
    """All but the grid; of variants, those that it needs."""
    monkeypatch.setenv("SDM_VARIANTS", "real:\njitter: jitter\npseudo: source=pseudo\nratio1: ratio=1")

    def settings():
        plan.main([str(raw), str(tmp_path)])
        return json.loads((tmp_path / "grid.json").read_text())["settings"]

    def changed(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return {name for name, value in settings().items() if value != before[name]}

    monkeypatch.setenv("SDM_GRID", "masks 10 0 all")
    before = settings()
    assert len(set(before.values())) == 4
    assert changed(SDM_GRID="masks 10 0-1 real,jitter") == set()
    assert changed(SDM_VARIANTS="real:\njitter: jitter\npseudo: source=pseudo\nratio1: ratio=2") == {"ratio1"}
    assert changed(S="2.5") == set(before)


def test_finished_stages_say_how_long_others_take(shipped, tmp_path):
    stages, logs = tmp_path / "stages", tmp_path / "logs"
    stages.mkdir()
    logs.mkdir()
    for name, files, seconds in (
        ("masks-f10-s0-model", ["masks-f10-s0/model/ema_0.9_000200.pt"], 100),
        (
            "masks-f10-s0-samples",
            [f"masks-f10-s0/samples/{name}/{k}.png" for name in ("samples", "labels") for k in range(4)],
            6,
        ),
        ("masks-f10-s0-made", ["masks-f10-s0/made/samples/0.png", "masks-f10-s0/made/labels/0.png"], 2.5),
        ("masks-f10-s1-made", ["masks-f10-s0/made/samples/0.png"], 0.1),  # the end of what was broken off
    ):
        starts = 1 + name.startswith("masks-f10-s1")
        (logs / f"{name}.log").write_text(starts * "# 2026-11-28 08:00:00 python ...\n# one of the program's\n")
        for path, at in ((stages / f"{name}.begun", 1000), (stages / f"{name}.json", 1000 + seconds)):
            path.write_text(json.dumps({"files": dict.fromkeys(files)}))
            os.utime(path, (at, at))
    result = tmp_path / "masks-f10-s0/segmenters/real/result.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"steps": 40, "seconds": 10}')
    found = plan.measured(tmp_path)
    assert {name: rate for name, (rate, _) in found.items() if name != "filter"} == pytest.approx(
        {"model": 0.5, "sample": 2.0, "segmenter": 0.25}
    )
    assert found["sample"][1] == "measured, median of 2" and found["filter"][1] == "assumed"


def test_patches_are_counted_at_the_magnification_they_are_brought_to(raw):
    flags = ["--patch_size", "128", "--stride", "128"]
    assert set(plan.count_patches(raw, flags).values()) == {64}
    halved = plan.count_patches(raw, [*flags, "--mpp", "0.5", "--slide_mpp", "slide-07=0.5"])
    assert halved.pop("slide-07") == 64 and set(halved.values()) == {16}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("NPROC", "5", "DIFFUSION_BATCH=32 is no multiple of NPROC=5"),
        ("DIFFUSION_BATCH", "256", "GRID: masks-f10-s0 gives the diffusion model 128 patches with masks, fewer than"),
        ("SDM_GRID", "masks ten 0 all", "GRID: .* share=ten|share=ten is not a number"),
        ("SDM_VARIANTS", "more: ratio=1", "GRID: .* is not of VARIANTS|VARIANTS has none of real patches alone"),
        ("CELLS", "masks-f10-s9", "CELLS names masks-f10-s9: choose of masks-f10-s0"),
        ("S", "three", "S=three must be at least 0: mend CONFIG"),
        ("VAL_SHARE", "", r"VAL_SHARE= must lie in \[0, 1\)"),
        ("DIFFUSION_STEPS", "0", "DIFFUSION_STEPS=0 must be at least 1"),
        ("EMA_RATE", "2", r"EMA_RATE=2 must lie in \(0, 1\)"),
        ("RATES", "model=1 sample=fast", "does not say sample=SECONDS of a sample"),
        ("SDM_GRID", "", "GRID has no row"),
        ("SDM_GRID", "masks 10 4-0 all", "seeds 4-0 go down"),
        ("SDM_SEGMENTER_FLAGS", "--crop 512", "have --crop 512, and patches"),
        ("SDM_MODEL_FLAGS", "--image_size 512", "have --image_size 512, and patches"),
        ("SDM_CLUSTER_FLAGS", "--n_clusters 0", "--n_clusters below 1"),
    ],
)
def test_what_cannot_is_refused(raw, shipped, monkeypatch, tmp_path, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        plan.main([str(raw), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "side"),
    [("--patch_size 64 --stride 32", 64), ("--patch_size 128 --resize 32", 32), ("--mode mirror", 128)],
)
def test_the_side_of_patches(flags, side):
    assert plan.patch_side(flags) == side
