"""A model made ready to hand on: its weights, what lies beside them, and the mistakes that are named. And weights/."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch as th

from guided_diffusion import checkpoint
from scripts import publish_model

ROOT = Path(__file__).resolve().parents[1]
(WEIGHTS,) = (ROOT / "weights").glob("*.pt")


@pytest.fixture
def model(tmp_path) -> Path:
    """A checkpoint, with what training leaves beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    checkpoint.save(
        {"a.weight": th.tensor([1.0, 1 / 3]), "a.bias": th.tensor([2.0**-20])}, str(folder), "ema_0.9_000010.pt"
    )
    config = {"data_dir": "/home/me/slides", "unlabelled_dir": "/x/one,/y/two", "lr": 0.1, "init_checkpoint": "/z/a.pt"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "card.md").write_text("# Model card\n")
    return folder / "ema_0.9_000010.pt"


def sums_hold(folder: Path) -> bool:
    lines = (folder / publish_model.SUMS).read_text().splitlines()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    del found[publish_model.SUMS]
    return {name: digest for digest, name in (line.split("  ") for line in lines)} == found


def test_weights_flags_card_and_sums(model, tmp_path):
    out = tmp_path / "out"
    figures = tmp_path / "figures.md"
    figures.write_text("## Figures\n")
    for _ in range(2):  # again, in place of what is there
        publish_model.main([str(model), str(out), "--figures", str(figures)])
        weights = checkpoint.load(str(out / model.name))
        assert {value.dtype for value in weights.values()} == {th.float16}
        assert th.equal(weights["a.weight"].float(), th.tensor([1.0, 1 / 3]).half().float())
        config = json.loads((out / "config.json").read_text())
        assert "/" not in json.dumps(config)
        assert (config["data_dir"], config["unlabelled_dir"], config["init_checkpoint"]) == (
            "slides",
            "one,two",
            "a.pt",
        )
        assert config["lr"] == 0.1
        assert (out / "card.md").read_text() == "# Model card\n\n## Figures\n"
        assert sums_hold(out)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": th.tensor([1e6])}, "16 bits cannot"),
        ({"step": 3}, "no model's weights"),
        ({"a": th.tensor([1])}, "no mod"),
    ],
)
def test_what_is_no_model_or_does_not_fit(model, tmp_path, state, message):
    checkpoint.save(state, str(model.parent), model.name)
    with pytest.raises(ValueError, match=message):
        publish_model.main([str(model), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_mistakes(model, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no folder of this program"):
        publish_model.main([str(model), str(foreign)])
    assert (foreign / "thesis.tex").exists()
    (model.parent / "card.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"card\.md"):
        publish_model.main([str(model), str(tmp_path / "out")])


def test_the_weights_that_are_shipped():
    """They are small and unspoilt, say under which licence their data are, and know no place of any machine."""
    assert WEIGHTS.stat().st_size <= 5e6 and sums_hold(WEIGHTS.parent)
    assert "/" not in (WEIGHTS.parent / "config.json").read_text()
    card = (WEIGHTS.parent / "card.md").read_text()
    assert "licence: CC0" in card and re.search(r"^\| \d+ \| 0\.\d+ \| 0\.\d+ \|$", card, re.M)
