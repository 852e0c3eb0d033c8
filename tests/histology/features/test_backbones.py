"""Backbones: preprocessing, pooling, independence of batch and order, and every refusal."""

import sys

import numpy as np
import pytest
import torch as th

from guided_diffusion.histology.features import backbones
from guided_diffusion.histology.features.backbones import load_backbone

CPU = th.device("cpu")


def images(count=5, size=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def lite():
    pytest.importorskip("efficientnet_lite_pytorch")
    return load_backbone("efficientnet_lite0", CPU)


def test_lite_gives_the_networks_own_features(lite):
    """Its logits are its last layer of our vector, at the size at which nothing is resized."""
    x = images(2, backbones.LITE_SIZE)
    with th.no_grad():
        logits = lite.net((th.from_numpy(x).permute(0, 3, 1, 2).float() - 127) / 128)
        ours = lite.net._fc(th.from_numpy(lite.embed(x)))
    assert th.allclose(logits, ours, atol=1e-4)
    assert lite.embed(x).shape == (2, 1280) and lite.embed(x).dtype == np.float32


def test_lite_normalisation_is_the_one_its_batch_norm_recorded(lite):
    """On a photograph the first layer's variance is nearest to the running one with (v - 127) / 128."""
    photo = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")[:, 100:527]
    x = backbones.resized(backbones.as_batch(photo[None], CPU), 224)
    mean, deviation = (255 * th.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def off(y):
        with th.no_grad():
            variance = lite.net._conv_stem(y).var((0, 2, 3))
        return (variance / lite.net._bn0.running_var).log().median().abs()

    assert off((x - 127) / 128) < 0.5 < min(off(x / 255), off((x - mean) / deviation))


def test_lite_maps_are_the_stages_at_strides_8_and_16(lite):
    seen = []
    hooks = [lite.net._blocks[i].register_forward_hook(lambda m, a, out: seen.append(out)) for i in (4, 10)]
    lite.embed(images(1))
    for hook in hooks:
        hook.remove()
    fine, coarse = lite.maps(images(1))
    assert fine.shape == (1, 40, 16, 16) and coarse.shape == (1, 112, 8, 8)
    assert th.allclose(fine, seen[0], atol=1e-5) and th.allclose(coarse, seen[1], atol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "stain"])
def test_a_vector_depends_on_its_image_alone(name):
    if name != "stain":
        pytest.importorskip("efficientnet_lite_pytorch")
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
    assert backbones.hash_weights(first) != backbones.hash_weights(second)
    second.load_state_dict(first.state_dict())
    assert backbones.hash_weights(first) == backbones.hash_weights(second)
    assert len(backbones.hash_weights(first)) == 16


def test_stain_unmixes_pure_stains():
    """An image painted with known amounts of the two stains gives these amounts back."""
    h, e = (np.array(v) / np.linalg.norm(v) for v in backbones.STAINS)
    amounts = np.random.default_rng(0).uniform(0.1, 0.7, (2, 16, 16, 1))
    density = amounts[0] * h + amounts[1] * e
    image = np.clip(np.round(256 * 10**-density - 1), 0, 255).astype(np.uint8)
    vector = load_backbone("stain", CPU).embed(image[None])[0].reshape(5, 7)
    for k, of in ((3, 0), (4, 1)):
        expected = [amounts[of].mean(), amounts[of].std(), *np.quantile(amounts[of], backbones.OD_QUANTILES)]
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
    "name, package", [("efficientnet_lite0", "efficientnet_lite_pytorch"), ("hf:google/vit", "transformers")]
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
