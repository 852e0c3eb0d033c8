"""What several test modules share: where the development data lies, if it is there."""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch as th
from PIL import Image

from guided_diffusion import logger

if not th.cuda.is_available():
    # Where there are GPUs that this torch cannot use, the programs refuse to start: see test_devices.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Small tensors gain nothing from a second thread, lose much where something else runs beside, and round otherwise: here
# and in the programs that tests start.
th.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have it ignored


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Again before every test: libraries that limit threads for a while may leave another number behind."""
    th.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    The long ones first in either half, since two processes that share the work begin with a half each; then they end
    together. Those of workflows stay together: they share a run that takes a minute.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    workflows = [item for item in slow if item.path.parent.name == "workflow"]
    others = [item for item in slow if item.path.parent.name != "workflow"]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    room = max(0, len(items) // 2 - len(workflows))
    items[:] = [*workflows, *fast[:room], *others, *fast[room:]]


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def monuseg() -> Path:
    folder = SHARED / "data" / "monuseg"
    if not folder.is_dir():
        pytest.skip("MoNuSeg is not on this machine")
    return folder


def draw_patch(seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A noisy pink image and an instance map of some discs, ids with gaps."""
    rng = np.random.default_rng(seed)
    inst = np.zeros((size, size), np.int32)
    rows, cols = np.mgrid[:size, :size]
    for i in range(4):
        r, c = rng.integers(0, size, 2)
        inst[(rows - r) ** 2 + (cols - c) ** 2 <= int(rng.integers(9, 30))] = 10 * i + int(rng.integers(1, 9))
    base = np.where(inst[..., None] > 0, (90, 60, 130), (220, 160, 200)) + rng.integers(-20, 20, 3)
    image = np.clip(base + rng.normal(0, 8, (size, size, 3)), 0, 255).astype(np.uint8)
    return image, inst


def write_patches(folder: Path, count: int = 8, size: int = 32, bin_masks: bool = True, first: int = 0) -> Path:
    """Fill a MoNuSeg-layout split folder with drawn patches; :return: the folder."""
    for name in ("images", "inst_masks", *(["bin_masks"] if bin_masks else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        image, inst = draw_patch(k, size)
        Image.fromarray(image).save(folder / "images" / f"slide-{k // 4}_{k % 4:03d}.png")
        Image.fromarray(inst).save(folder / "inst_masks" / f"slide-{k // 4}_{k % 4:03d}.tif")
        if bin_masks:
            mask = (inst > 0).astype(np.uint8) * 255
            Image.fromarray(mask).save(folder / "bin_masks" / f"slide-{k // 4}_{k % 4:03d}.png")
    return folder


def write_class_masks(folder: Path, rare: int = 7) -> list[str]:
    """Add class masks to a split folder: nuclei whose id this divides are of class 2, others of 1; :return: flags."""
    (folder / "class_masks").mkdir()
    for path in (folder / "inst_masks").iterdir():
        inst = np.asarray(Image.open(path))
        classes = np.where(inst > 0, 1 + (inst % rare == 0), 0).astype(np.uint8)
        Image.fromarray(classes).save(folder / "class_masks" / f"{path.stem}.png")
    return ["--class_cond", "True", "--num_classes", "3"]


def write_images(folder: Path, count: int = 8, size: int = 32, first: int = 200) -> Path:
    """Fill a folder with drawn images without masks, as patches of other slides; :return: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        Image.fromarray(draw_patch(k, size)[0]).save(folder / f"other-{k // 4}_{k % 4:03d}.png")
    return folder


def assert_same_batch(batch, other):
    """Of two batches of the loader: tensors and lists are equal."""
    (x, cond), (other_x, other_cond) = batch, other
    assert th.equal(x, other_x) and cond.keys() == other_cond.keys()
    for name, part in cond.items():
        assert th.equal(part, other_cond[name]) if th.is_tensor(part) else part == other_cond[name], name


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A MoNuSeg-layout data set: 8 training and 4 test patches of 32 px."""
    write_patches(tmp_path / "data" / "MoNuSegTrainingData")
    write_patches(tmp_path / "data" / "MoNuSegTestData", count=4, first=100)
    return tmp_path / "data"


# The smallest model with every kind of layer: two levels, attention, SPADE, resampling inside residual blocks.
TINY = (
    "--image_size 16 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 8 "
    "--num_head_channels 16 --resblock_updown True --learn_sigma True --noise_schedule cosine "
    "--num_classes 6 --use_hv_map True --use_col_map True --num_workers 0"
).split()


@pytest.fixture
def logdir(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where a training run of this test writes; it is not made yet."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
    yield tmp_path / "log"
    logger.close()  # which a run that failed has not done


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> Iterator[Path]:
    """An interpreter that starts this repository's programs at once."""
    from quick_python import quick_python  # programs of tests import this module without pytest's paths

    with quick_python(tmp_path_factory.mktemp("quick")) as program:
        yield program


@pytest.fixture
def small_disk(tmp_path):
    """:return: a function that makes a folder on a disk of so many KiB; skips where nothing may be mounted."""
    mounted = []

    def mount(kib):
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("nothing may be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def new_pages() -> int:
    """:return: how many pages of memory a tensor of 40 MiB, 10240 of them, takes from the system once one was freed."""
    faults = []
    for _ in range(10):
        th.ones(10 * 2**20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(np.diff(faults))
