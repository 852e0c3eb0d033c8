"""What each share of the experiment comes to, of the settings as they are shipped."""

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scripts.experiment import plan

CONFIG = Path(plan.__file__).with_name("experiment.conf")
NUMBERS = ("FRACTIONS", "SEEDS", "VAL_SHARE", "DIFFUSION_BATCH", "DIFFUSION_STEPS", "MAX_EPOCHS")


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """30 training slides of MoNuSeg's size."""
    folder = tmp_path_factory.mktemp("raw") / "MoNuSegTrainingData"
    for name in ("images", "inst_masks"):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            Image.new("1", (1000, 1000)).save(folder / name / f"slide-{number:02d}.png")
    return folder.parent


@pytest.fixture
def shipped(monkeypatch):
    """Settings of experiment.conf in the environment."""
    words = 'printf "%s\\0" "$FRACTIONS" "$SEEDS" "$VAL_SHARE" "$DIFFUSION_BATCH" "$DIFFUSION_STEPS" "$MAX_EPOCHS"'
    script = f'set -eu; source {CONFIG}; {words} "${{PATCH_FLAGS[*]}}" "${{MODEL_FLAGS[*]}}" "$STRUCTURES" "$SAMPLES"'
    values = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")
    for name, value in zip((*NUMBERS, "SDM_PATCH_FLAGS", "SDM_MODEL_FLAGS", "STRUCTURES", "SAMPLES"), values):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("processes", [1, 8])
def test_the_smallest_share_can_be_trained(raw, shipped, monkeypatch, capsys, processes):
    monkeypatch.setenv("NPROC", str(processes))
    plan.main([str(raw)])
    printed = capsys.readouterr().out
    assert f"{processes} process(es), each with {32 // processes} of 32 patches a step" in printed
    rows = [re.findall(r"[\d.]+(?: to \d+)?", row) for row in printed.splitlines()[3:]]
    # 64 patches a slide; of three slides one is held out.
    assert rows[0] == ["100", "30", "4", "1920", "1664", "20000", "385"]
    assert rows[3] == ["10", "3", "1", "192", "128", "2000", "500"]


def test_patches_are_counted_at_the_magnification_they_are_brought_to(raw):
    flags = ["--patch_size", "128", "--stride", "128"]
    assert set(plan.count_patches(raw, flags).values()) == {64}
    halved = plan.count_patches(raw, [*flags, "--mpp", "0.5", "--slide_mpp", "slide-07=0.5"])
    assert halved.pop("slide-07") == 64 and set(halved.values()) == {16}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SAMPLES", "1", "STRUCTURES=both with SAMPLES=1: give 2"),
        ("NPROC", "5", "DIFFUSION_BATCH=32 is no multiple of NPROC=5"),
        ("DIFFUSION_BATCH", "256", "FRACTIONS: 10 % of the slides give the diffusion model 128 patches, fewer than"),
    ],
)
def test_what_cannot_is_refused(raw, shipped, monkeypatch, name, value, message):
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setenv("STRUCTURES", "both")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        plan.main([str(raw)])


@pytest.mark.parametrize("flags", ["--lr 1 --image_size 32 --num_channels 8", "--image_size=32", "--lr 1"])
def test_the_size_of_the_models_images(flags):
    assert plan.image_size(flags) == (64 if flags == "--lr 1" else 32)
