"""What config.json beside a checkpoint says of its flags."""

import pytest

from guided_diffusion import trained_flags
from guided_diffusion.files import write_json


def test_config_names_the_first_field_that_differs(tmp_path):
    path = str(tmp_path / "model000001.pt")
    flags = {"image_size": 64, "num_channels": 32, "lr": 1e-4}
    trained_flags.check_config(path, flags)  # nothing is known: nothing is refused
    write_json(tmp_path / "config.json", flags)
    trained_flags.check_config(path, {**flags, "lr": 5e-4})
    with pytest.raises(ValueError, match="--num_channels 32, this run has --num_channels 64"):
        trained_flags.check_config(path, {**flags, "num_channels": 64})
    before = {"spade_channels": 128, "predict_v": False, "loss_weights": "none"}  # in what is older than these flags
    trained_flags.check_config(path, {**flags, **before})
    assert trained_flags.load_config(path).items() >= before.items()
    with pytest.raises(ValueError, match="--spade_channels 128, this run has --spade_channels 32"):
        trained_flags.check_config(path, {**flags, "spade_channels": 32})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json does not parse"):
        trained_flags.check_config(path, flags)


@pytest.mark.parametrize(
    ("name", "value"), [("mark_unknown", "yes"), ("drop_hvb_only", 1), ("drop_rate", "0.2"), ("unlabelled_share", None)]
)
def test_a_flag_of_another_type_is_refused(tmp_path, name, value):
    write_json(tmp_path / "config.json", {name: value})
    with pytest.raises(ValueError, match=rf"config\.json has --{name} {value!r}: restore it or remove it"):
        trained_flags.load_config(str(tmp_path / "model000001.pt"))


def test_data_of_another_magnification_than_the_model_knows_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trained_flags.logger, "warn", said.append)
    write_json(tmp_path / "config.json", {"mpp": 0.5})
    for mpp in (0.5, 0.25):
        write_json(tmp_path / "prepare.json", {"mpp": mpp})
        trained_flags.check_config(str(tmp_path / "model000001.pt"), {"data_dir": str(tmp_path)})
    trained_flags.check_config(str(tmp_path / "model000001.pt"), {"structure_dir": str(tmp_path)})
    assert len(said) == 2 and all("was trained at 0.5 um a pixel" in line and "has 0.25" in line for line in said)
