"""The command: images -> FEATURES.npz, resumed after a kill, and one line for every mistake."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion.histology.features import embeddings
from guided_diffusion.histology.features.embeddings import load_features
from scripts import extract_features

ROOT = Path(__file__).resolve().parents[1]


def test_writes_features_of_a_data_folder(data_dir, tmp_path, capsys):
    out = tmp_path / "f" / "stain.npz"
    extract_features.main([str(data_dir), "--results_path", str(out), "--backbone", "stain"])
    made = load_features(out)
    assert made.features.shape == (12, 35) and made.backbone == "stain"
    assert made.paths[0] == "MoNuSegTestData/images/slide-25_000.png" and made.stems[-1] == "slide-1_003"
    assert [path.name for path in out.parent.iterdir()] == ["stain.npz"]
    assert "nearest other image is of the same slide" in capsys.readouterr().out


def test_goes_on_after_a_kill(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK", 5)
    command = [str(data_dir), "--results_path", str(tmp_path / "f.npz"), "--backbone", "stain", "--batch_size", "5"]
    extract_features.main(command)
    whole = (tmp_path / "f.npz").read_bytes()
    (tmp_path / "f.npz").unlink()
    embed, calls = extract_features.load_backbone("stain", th.device("cpu")).__class__.embed, []

    def killed(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(self, images)

    monkeypatch.setattr("guided_diffusion.histology.features.backbones.Stain.embed", killed)
    with pytest.raises(KeyboardInterrupt):
        extract_features.main(command)
    assert not (tmp_path / "f.npz").exists() and [path.suffix for path in (tmp_path / "f.npz.parts").iterdir()] == [
        ".npy"
    ]
    extract_features.main(command)
    assert sum(calls) == 5 + 5 + 7 and (tmp_path / "f.npz").read_bytes() == whole
    assert not (tmp_path / "f.npz.parts").exists()


@pytest.mark.slow
def test_bf16_differs_little(data_dir, tmp_path):
    for precision in ("fp32", "bf16"):
        extract_features.main(
            [str(data_dir), "--results_path", f"{tmp_path}/{precision}.npz", "--precision", precision]
        )
    one, two = (load_features(tmp_path / f"{name}.npz").features for name in ("fp32", "bf16"))
    assert 0 < np.abs(one - two).mean() < 0.05 * one.std()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--results_path", "f.npy"], "must end in .npz"),
        (["--backbone", "resnet"], "unknown --backbone 'resnet'"),
        (["--backbone", "sdm:none.pt"], "none.pt is not a file"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--num_workers", "-1"], "--num_workers -1"),
        (["--device", "abacus"], "--device abacus"),
        (["--root", "elsewhere"], "--root .*elsewhere does not hold"),
    ],
)
def test_a_mistake_writes_nothing(data_dir, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        extract_features.main([str(data_dir), "--results_path", "f.npz", "--backbone", "stain", *flags])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_link_and_another_programs_file_are_refused(data_dir, tmp_path):
    (tmp_path / "f.npz").write_text("mine")
    with pytest.raises(ValueError, match="is no feature file"):
        extract_features.main([str(data_dir), "--results_path", str(tmp_path / "f.npz"), "--backbone", "stain"])
    (data_dir / "MoNuSegTestData" / "images" / "z.png").symlink_to("nowhere.png")
    with pytest.raises(FileNotFoundError, match="z.png is gone"):
        extract_features.main([str(data_dir), "--results_path", str(tmp_path / "g.npz"), "--backbone", "stain"])
    assert not list(tmp_path.glob("g.npz*"))


def test_an_image_of_16_bits_writes_nothing(data_dir, tmp_path):
    Image.new("I;16", (32, 32)).save(data_dir / "MoNuSegTestData" / "images" / "a.png")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"a\.png"):
        extract_features.main([str(data_dir), "--results_path", str(tmp_path / "f.npz"), "--backbone", "stain"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("part", [".", "MoNuSegTrainingData", "MoNuSegTrainingData/images"])
def test_a_folder_that_was_not_prepared_to_the_end_is_refused(data_dir, tmp_path, part):
    (data_dir / "prepare.json").write_text('{"complete": false}')
    with pytest.raises(ValueError, match=r"DIR: .* is not prepared to the end: run prepare_monuseg.py again"):
        extract_features.main([str(data_dir / part), "--results_path", str(tmp_path / "f.npz"), "--backbone", "stain"])
    (data_dir / "prepare.json").write_text('{"complete": true}')
    extract_features.main([str(data_dir / part), "--results_path", str(tmp_path / "f.npz"), "--backbone", "stain"])


@pytest.mark.slow
def test_runs_as_a_program(quick, tmp_path):
    command = [quick, str(ROOT / "scripts" / "extract_features.py"), str(tmp_path), "--results_path", "x.npz"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr.startswith("error: DIR:") and ended.stderr.count("\n") == 1


def test_a_damaged_image_leaves_nothing(data_dir, tmp_path):
    image = next((data_dir / "MoNuSegTrainingData/images").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(ValueError, match=image.name):
        extract_features.main(
            [str(data_dir), "--results_path", str(tmp_path / "new/f.npz"), "--backbone", "stain", "--num_workers", "0"]
        )
    assert not (tmp_path / "new/f.npz.parts").exists()
