"""The choice of a device, on a machine without GPUs; an nvidia-smi of the test's own lists some."""

import pytest
import torch as th
from conftest import new_pages

import image_sample
import image_train
from guided_diffusion import cli, devices

pytestmark = pytest.mark.skipif(th.cuda.is_available(), reason="torch can use the GPUs of this machine")

THREE = """#!/bin/sh
case "$1" in
    -L) for k in 0 1 2; do echo "GPU $k: NVIDIA A100 (UUID: GPU-$k)"; done ;;
    *driver*) echo 470.82.01; echo 470.82.01; echo 470.82.01 ;;
esac
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an nvidia-smi before all others on PATH; :return: a function that writes it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


def test_gpus_that_torch_cannot_use(driver, monkeypatch):
    driver(THREE)
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError) as error:
            devices.find_device(device)
        assert "nvidia-smi lists 3 GPUs (driver 470.82.01), but torch" in str(error.value)
        built = f"CUDA {th.version.cuda}, can" if th.version.cuda else "no CUDA, for CPUs only, can"
        assert f"built for {built}" in str(error.value) and "--device cpu" in str(error.value)
    assert devices.find_device("cpu") == th.device("cpu")
    driver(THREE.replace("*driver*", "*other*"))  # one that does not tell its version
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(ValueError, match=r"lists 3 GPUs \(CUDA_VISIBLE_DEVICES=5\)"):
        devices.find_device()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden(driver, monkeypatch, hidden):
    driver(THREE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.find_device() == th.device("cpu")


@pytest.mark.parametrize("script", ["#!/bin/sh\necho No devices found.\n", "#!/bin/sh\nexit 9\n", "no program"])
def test_a_driver_without_gpus(driver, script):
    driver(script)
    assert devices.find_device() == th.device("cpu")
    with pytest.raises(ValueError, match=r"there is no GPU, but torch .* --device cpu"):
        devices.find_device("cuda")


@pytest.mark.parametrize("text", ["tpu", "cpu:1", "cuda:-1", "cuda:x"])
def test_unknown_device(text):
    with pytest.raises(ValueError, match=f"--device {text}: give auto, cpu, cuda"):
        devices.find_device(text)


@pytest.mark.parametrize(
    "main, flag, missing",
    [
        (image_train.main, "--data_dir", "--data_dir 'nowhere'"),
        (image_sample.main, "--model_path", "--model_path nowhere is not a file"),
    ],
)
def test_programs_compute_where_they_are_told(driver, capsys, main, flag, missing):
    driver(THREE)
    for device, said in (("auto", "--device auto: nvidia-smi lists 3 GPUs"), ("cpu", missing)):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: main([flag, "nowhere", "--device", device]))  # noqa: B023
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith(f"error: {said}"), err


def test_memory_is_used_again():
    devices.keep_memory(False)
    assert new_pages() > 10000
    devices.keep_memory()
    assert new_pages() < 100
    devices.keep_memory(False)


@pytest.fixture
def kernels(monkeypatch):
    """A GPU, as far as find_device looks; torch's settings of its kernels are the other way round, for a while."""
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(th.cuda, name, lambda *_, value=value: value)
    cudnn, matmul = th.backends.cudnn, th.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, True, False
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def test_convolutions_alone_are_in_tf32(kernels):
    assert devices.find_device() == th.device("cuda", 0)
    assert th.backends.cudnn.allow_tf32 and not th.backends.cuda.matmul.allow_tf32


def test_training_alone_tries_kernels(kernels):
    devices.find_device()
    assert not th.backends.cudnn.benchmark
    devices.prepare_training(th.device("cuda", 0))
    assert th.backends.cudnn.benchmark
