"""Our own U-Net as a backbone: what it pools, and that a vector depends on its image alone."""

import json

import numpy as np
import pytest
import torch as th

from guided_diffusion.bridge import load_backbone
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

CPU = th.device("cpu")
SMALL = dict(
    image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8",
    num_head_channels=16, num_classes=6, use_col_map=True,
)  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """A checkpoint with weights that are not zero anywhere, and its config."""
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **SMALL})
    th.manual_seed(0)
    for parameter in model.parameters():
        th.nn.init.normal_(parameter, std=0.05)
    th.save(model.state_dict(), tmp_path / "model000001.pt")
    config = {**model_and_diffusion_defaults(), **SMALL, "use_hv_map": True, "no_instance": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "model000001.pt"


def images(count=4, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def load(name, dtype=th.float32):
    return load_backbone(name, CPU, dtype)


def test_pools_each_level_and_the_middle(trained):
    backbone = load(f"sdm:{trained}@50")
    x = images()
    vectors = backbone.embed(x)
    assert vectors.shape == (4, 32 + 64 + 64) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    fine, coarse = backbone.maps(x)
    assert fine.shape == (4, 32, 16, 16) and coarse.shape == (4, 64, 8, 8)
    assert np.allclose(vectors[:, :32], fine.mean((2, 3)), atol=1e-6)
    assert np.allclose(vectors[:, 32:96], coarse.mean((2, 3)), atol=1e-6)


def test_the_whole_model_goes_on_from_these_features(trained):
    """By the encoder's maps that decode takes up, the model's own output is reproduced."""
    backbone = load(f"sdm:{trained}@50")
    seen = []
    backbone.model.middle_block.register_forward_hook(lambda m, a, out: seen.append(out))
    backbone.embed(images())
    x = th.from_numpy(images()).permute(0, 3, 1, 2) / 127.5 - 1
    t = th.full((4,), 50)
    with th.no_grad():
        backbone.model(backbone.diffusion.q_sample(x, t, backbone.noise.expand_as(x)), t, th.zeros(4, 6, 16, 16))
    assert th.allclose(seen[0], seen[1], atol=1e-5)


def test_a_vector_depends_on_its_image_alone(trained):
    backbone = load(f"sdm:{trained}")
    x = images()
    whole = backbone.embed(x)
    assert np.abs(whole - np.concatenate([backbone.embed(x[i : i + 1]) for i in range(4)])).max() < 1e-5
    assert np.abs(whole[::-1] - load(f"sdm:{trained}").embed(x[::-1])).max() < 1e-5


def test_timestep_weights_and_precision_count(trained):
    x = images()
    default = load(f"sdm:{trained}")
    assert np.array_equal(default.embed(x), load(f"sdm:{trained}@100").embed(x))
    assert not np.allclose(default.embed(x), load(f"sdm:{trained}@400").embed(x), atol=1e-4)
    half = load(f"sdm:{trained}", th.bfloat16)
    assert half.weight_hash == default.weight_hash and len(half.weight_hash) == 16
    assert np.abs(half.embed(x) - default.embed(x)).mean() < 0.1 * default.embed(x).std()


def test_other_sizes_are_brought_to_the_models(trained):
    backbone = load(f"sdm:{trained}")
    ramp = np.linspace(0, 240, 16, dtype=np.uint8)
    x = np.broadcast_to(ramp[None, :, None, None], (2, 16, 16, 3)).copy()
    assert np.allclose(backbone.embed(x.repeat(2, 1).repeat(2, 2)), backbone.embed(x), atol=0.05)


@pytest.mark.parametrize("name, message", [("none.pt", "none.pt is not a file"), ("{}@1000", "timestep of 0 to 999")])
def test_refusals(trained, name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(f"sdm:{name.format(trained)}")


def test_config_is_needed_and_must_fit(trained):
    config = json.loads((trained.parent / "config.json").read_text())
    (trained.parent / "config.json").write_text(json.dumps({**config, "num_channels": 64}))
    with pytest.raises(ValueError, match="in this configuration"):
        load(f"sdm:{trained}")
    (trained.parent / "config.json").write_text(json.dumps({**config, "num_channels": "32"}))
    with pytest.raises(ValueError, match="--num_channels '32'"):
        load(f"sdm:{trained}")
    (trained.parent / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json beside"):
        load(f"sdm:{trained}")


def test_the_middle_gets_the_models_own_null_condition(trained):
    assert not load(f"sdm:{trained}").null.any()
    config = json.loads((trained.parent / "config.json").read_text())
    (trained.parent / "config.json").write_text(json.dumps({**config, "mark_unknown": True}))
    null = load(f"sdm:{trained}").null
    assert null.shape == (1, 6, 16, 16) and (null[:, 5] == -1).all() and not null[:, :5].any()
