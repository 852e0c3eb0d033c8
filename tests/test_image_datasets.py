"""Pairing, reading, appearances, and what a batch holds."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch as th
from conftest import assert_same_batch, draw_patch, write_class_masks, write_images, write_patches
from PIL import Image
from scipy import ndimage
from torch.utils.data import default_collate

from guided_diffusion import data_util, image_datasets, streams
from guided_diffusion.conditioning import ConditionSpec, instance_edges, shuffled_order
from guided_diffusion.data_stream import StreamSampler, stream
from guided_diffusion.hv_maps import gen_instance_hv_map
from guided_diffusion.image_datasets import load_data, load_dataset
from guided_diffusion.images import list_structures
from guided_diffusion.reading import read_structure

SPEC = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)
TRAIN = "MoNuSegTrainingData"


def dataset(data_dir, **options):
    defaults = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=32, spec=SPEC)
    return load_dataset(**{**defaults, **options})


def batches(data_dir, count, **options):
    defaults = dict(data_dir=str(data_dir), dataset_mode="monuseg", image_size=32, batch_size=4)
    spec = asdict(options.pop("spec", SPEC))
    return list(itertools.islice(load_data(**{**defaults, **spec, **options}), count))


def one(own, epoch, index):
    """A sample, as load_data gives batches of them."""
    batch, cond = image_datasets._as_there(*default_collate([own[epoch, index]]))
    return batch[0], {name: part[0] for name, part in cond.items()}


# ---- what comes out ----


def test_batches(data_dir):
    (x, cond), _ = batches(data_dir, 2, deterministic=True)
    assert x.shape == (4, 3, 32, 32) and x.dtype == th.float32
    assert x.min() >= -1 and x.max() <= 1
    image, inst = draw_patch(0)
    np.testing.assert_allclose(x[0].permute(1, 2, 0), image / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(cond["instance"][0, 0], inst)
    np.testing.assert_array_equal(cond["label_ori"][0], (inst > 0) * 255)
    assert cond["label"].shape == (4, 2, 32, 32)
    assert cond["path"][0].endswith("images/slide-0_000.png") and cond["path"] == cond["structure_path"]
    assert SPEC.assemble(cond).shape == (4, 6, 32, 32)


def test_test_split(data_dir):
    assert len(dataset(data_dir, is_train=False)) == 4


def test_without_bin_masks_they_come_from_the_instances(tmp_path):
    write_patches(tmp_path / "with" / TRAIN)
    write_patches(tmp_path / "without" / TRAIN, bin_masks=False)
    with_masks, without = (batches(tmp_path / name, 1, deterministic=True)[0] for name in ("with", "without"))
    for name in ("label", "instance", "label_ori", "col_map"):
        assert th.equal(with_masks[1][name], without[1][name]), name


def test_dsb2018_instances_are_connected_parts(tmp_path):
    folder = tmp_path / "train"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    image, inst = draw_patch(0)
    mask = (inst > 0).astype(np.uint8) * 255
    Image.fromarray(image).save(folder / "images" / "a.png")
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    sample = dataset(tmp_path, dataset_mode="dsb2018").read(0)
    class_map, inst_map = sample.masks
    np.testing.assert_array_equal(inst_map, ndimage.label(mask)[0])
    np.testing.assert_array_equal(class_map, mask)
    # Touching nuclei of two classes are two.
    classes = np.zeros((32, 32), np.uint8)
    classes[4:8, 4:8], classes[4:8, 8:12], classes[20:, 20:] = 1, 2, 1
    Image.fromarray(classes).save(folder / "masks" / "a.png")
    spec = ConditionSpec(class_cond=True, num_classes=3)
    class_map, inst_map = dataset(tmp_path, dataset_mode="dsb2018", spec=spec).read(0).masks
    assert np.array_equal(class_map, classes) and np.array_equal(inst_map > 0, classes > 0)
    assert len(np.unique(inst_map)) == 4 and inst_map[5, 7] != inst_map[5, 8]


def test_class_cond_reads_ids(data_dir):
    for path in (data_dir / TRAIN / "bin_masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 255 * 2).save(path)
    spec = ConditionSpec(class_cond=True, num_classes=3)
    (_, cond), *_ = batches(data_dir, 1, spec=spec)
    assert cond["label"].dtype == th.int32 and set(cond["label"].unique().tolist()) == {0, 2}
    with pytest.raises(ValueError, match="class id 2 is out of range for --num_classes 2"):
        dataset(data_dir, spec=ConditionSpec(class_cond=True, num_classes=2))


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("appearance", [0, 3])
def test_samples_by_definition(data_dir, preserve, appearance):
    """Bit by bit, in the first epoch and where the HV map is kept."""
    own = dataset(data_dir, seed=5, preserve_nuclei_col=preserve)
    own.appearance[0] = appearance
    (source, _), (_, inst) = draw_patch(appearance), draw_patch(0)
    for epoch in range(3):
        x, cond = one(own, epoch, 0)
        mask = inst > 0 if preserve else None
        order = shuffled_order((32, 32), mask, streams.generator("colour map", 5, epoch, 0))
        flat = source.reshape(-1, 3)
        for values, pixels in ((x, flat), (cond["col_map"], flat[order])):
            expected = pixels.reshape(32, 32, 3).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
            np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(cond["label"].permute(1, 2, 0), gen_instance_hv_map(inst))
        assert cond["index"] == 0 and type(cond["path"]) is type(cond["structure_path"]) is str
        image, compact = own[epoch, 0]
        assert image.dtype == compact["col_map"].dtype == np.uint8 and compact["instance"].dtype == np.int32
        own.ids = False
        edge = own[epoch, 0][1]["edge"]
        own.ids = True
        np.testing.assert_array_equal(edge, instance_edges(compact["instance"]))


@pytest.mark.parametrize("appearance", [0, 3])
def test_jittered_stains(data_dir, appearance):
    """The image and its colour map change together, anew in each epoch; masks do not, nor what is kept in memory."""
    plain, own = dataset(data_dir, seed=5), dataset(data_dir, seed=5, stain_jitter=0.35)
    plain.appearance[0] = own.appearance[0] = appearance
    images = []
    for epoch in (0, 1, 0):
        (x, cond), (before, unchanged) = one(own, epoch, 0), one(plain, epoch, 0)
        assert not th.equal(x, before) and th.equal(cond["label"], unchanged["label"])
        assert th.equal(cond["instance"], unchanged["instance"])
        colours = [sorted(map(tuple, part.flatten(1).T.tolist())) for part in (x, cond["col_map"])]
        assert colours[0] == colours[1]
        images.append(x)
    assert th.equal(images[0], images[2]) and not th.equal(images[0], images[1])


def test_areas_go_by_the_magnification_of_the_data(tmp_path):
    write_patches(tmp_path / "MoNuSegTrainingData", count=1, size=32)
    for mpp in (0.25, 1.0, 0.05):
        (tmp_path / "prepare.json").write_text(json.dumps({"mpp": mpp}))
        own = dataset(tmp_path)
        assert own.spec.mpp == mpp
        expected = gen_instance_hv_map(own.read(0).masks[1], mpp=mpp).transpose(2, 0, 1)
        assert np.array_equal(own[0, 0][1]["label"], expected) and expected.any() == (mpp > 0.1)
    assert dataset(tmp_path, spec=replace(SPEC, mpp=0.5)).spec.mpp == 0.5


# ---- what is kept in memory ----


def count_hv_maps(monkeypatch):
    made = []
    hv_planes = ConditionSpec.hv_planes
    monkeypatch.setattr(ConditionSpec, "hv_planes", lambda spec, inst: made.append(inst) or hv_planes(spec, inst))
    return made


def test_an_hv_map_is_made_once(data_dir, monkeypatch):
    made = count_hv_maps(monkeypatch)
    own = dataset(data_dir, shuffle_masks=True)
    list(itertools.islice(stream(own, 4), 10))
    assert len(made) == 8
    own.share_memory(2)
    assert own._limit - own._cached_bytes == (image_datasets.CACHE_BYTES - own._cached_bytes) // 2


@pytest.mark.parametrize("held", [0, 3, 8, 9, 11, 16])
def test_memory_is_bounded(data_dir, monkeypatch, held):
    """A 32 px sample takes 8192 bytes, and so does its HV map; the files are read at the start, since they are few."""
    expected = batches(data_dir, 5)
    monkeypatch.setattr(image_datasets, "CACHE_BYTES", 8192 * held + 100)
    own = dataset(data_dir)
    for batch, other in zip(expected, stream(own, 4)):
        assert_same_batch(batch, image_datasets._as_there(*other))
    assert own._cached_bytes == 8192 * held and len(own._hv_maps) == max(0, held - 8)


# ---- cropping and augmenting ----


def test_larger_images_are_cropped_centrally(tmp_path):
    write_patches(tmp_path / TRAIN, count=1, size=47)
    x, cond = one(dataset(tmp_path), 0, 0)
    image, inst = draw_patch(0, 47)
    np.testing.assert_array_equal(cond["instance"][0], inst[7:39, 7:39])
    np.testing.assert_allclose(x.permute(1, 2, 0), image[7:39, 7:39] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [32, 100])
def test_augmented_samples_stay_together(tmp_path, size):
    write_patches(tmp_path / TRAIN, count=2, size=size)
    augmented = dataset(tmp_path, augment=True)
    write_class_masks(tmp_path / TRAIN)
    classes = dataset(tmp_path, augment=True, spec=ConditionSpec(use_hv_map=True, class_cond=True, num_classes=3))
    seen = set()
    for epoch in range(20):
        x, cond = one(augmented, epoch, 0)
        inst = cond["instance"][0].numpy()
        np.testing.assert_array_equal(cond["label_ori"].numpy() > 0, inst > 0)
        # The HV map is made after the turn: it is that of the map that is given out.
        np.testing.assert_array_equal(cond["label"].permute(1, 2, 0), gen_instance_hv_map(inst))
        dark = x.mean(dim=0).numpy() < 0.1  # nuclei are dark; background is light
        assert (dark == (inst > 0)).mean() > 0.95
        seen.add(inst.tobytes())
        known = one(classes, epoch, 0)[1]
        np.testing.assert_array_equal(known["instance"][0], inst)
        np.testing.assert_array_equal(known["label_ori"], np.where(inst > 0, 1 + (inst % 7 == 0), 0))
    assert len(seen) >= 7


def test_samples_are_functions_of_seed_epoch_index(data_dir):
    def values(seed, key):
        return one(dataset(data_dir, augment=True, seed=seed), *key)

    (x, cond), (again, cond_again) = values(1, (2, 3)), values(1, (2, 3))
    assert th.equal(x, again) and th.equal(cond["col_map"], cond_again["col_map"])
    for other in (values(2, (2, 3)), values(1, (3, 3))):
        assert not th.equal(cond["col_map"], other[1]["col_map"])


# ---- structure and appearance ----


@pytest.mark.parametrize("option", ["shuffle_masks", "match_struct", "match_app"])
def test_appearance_of_another_item(data_dir, option):
    matched = dataset(data_dir, **{option: True})
    own = dataset(data_dir)
    assert (matched.appearance != np.arange(8)).any()
    for index in range(8):
        source = int(matched.appearance[index])
        x, cond = one(matched, 0, index)
        assert th.equal(x, one(own, 0, source)[0])
        assert th.equal(cond["instance"], one(own, 0, index)[1]["instance"])
        assert cond["path"] == own.items[source].image and cond["structure_path"] == own.items[index].image
        colours = ((cond["col_map"] + 1) * 127.5).round().flatten(1).sort().values
        assert th.equal(colours, ((x + 1) * 127.5).round().flatten(1).sort().values)
    np.testing.assert_array_equal(dataset(data_dir, **{option: True}).appearance, matched.appearance)


@pytest.mark.parametrize("option", ["match_struct", "match_app"])
def test_appearance_of_another_slide(data_dir, option):
    """There are two, of four patches each."""
    appearance = dataset(data_dir, match_other_slide=True, **{option: True}).appearance
    assert (appearance // 4 != np.arange(8) // 4).all()


def test_appearance_by_the_mixture_of_classes(data_dir):
    """Of 40 patches with the same nuclei, every other one's are of another class."""
    write_patches(data_dir / TRAIN, count=40)
    for number, path in enumerate(sorted((data_dir / TRAIN / "inst_masks").iterdir())):
        inst = draw_patch(0)[1]
        Image.fromarray(np.where(inst > 0, 7 * inst + number % 2, 0).astype(np.int32)).save(path)
    write_class_masks(data_dir / TRAIN)
    spec = ConditionSpec(use_hv_map=True, class_cond=True, num_classes=3)
    chosen = dataset(data_dir, spec=spec, match_struct=True).appearance
    assert (chosen % 2 == np.arange(40) % 2).all() and (chosen != np.arange(40)).all()
    assert (dataset(data_dir, match_struct=True).appearance % 2 != np.arange(40) % 2).any()
    # The same for structures without images, but with classes.
    for name in ("inst_masks", "class_masks"):
        (data_dir / "made" / name).mkdir(parents=True)
        for number, path in enumerate(sorted((data_dir / TRAIN / name).iterdir())[5:10]):
            shutil.copy(path, data_dir / "made" / name / f"made_{number}{path.suffix}")
    own = dataset(data_dir, spec=spec, match_struct=True, structure_dir=str(data_dir / "made"))
    assert (own.appearance >= 5).all() and (own.appearance % 2 == np.arange(5) % 2).all()
    assert own[0, 1, own.appearance[1]][1]["path"] == own.sources[own.appearance[1]].image
    own = dataset(data_dir, match_struct=True, structure_dir=str(data_dir / "made"))
    assert not own.sources[-1].inst_mask


def test_patches_are_weighed_by_their_classes(data_dir):
    write_class_masks(data_dir / TRAIN)
    spec = ConditionSpec(use_hv_map=True, class_cond=True, num_classes=3)
    ids = [np.unique(draw_patch(k)[1])[1:] for k in range(8)]
    counts = np.array([[(own % 7 > 0).sum(), (own % 7 == 0).sum()] for own in ids])
    own = dataset(data_dir, spec=spec, balance_classes=True)
    np.testing.assert_array_equal(own.weights, data_util.balanced_weights(counts))
    assert own.weights.max() > 1.2 and dataset(data_dir, spec=spec).weights is None
    drawn = [key[1] for key in itertools.islice(StreamSampler(8, weights=own.weights), 800)]
    np.testing.assert_allclose(np.bincount(drawn) / 100, own.weights, atol=0.15)
    batches = [next(stream(own, 8, num_workers=workers, seed=1)) for workers in (0, 2)]
    assert_same_batch(*batches)
    (data_dir / TRAIN / "class_masks").rename(data_dir / "elsewhere")
    spec = ConditionSpec(class_cond=True, num_classes=300)
    with pytest.raises(ValueError, match=r"--balance_classes True: .*_00\d.png has no classes in class_masks beside"):
        dataset(data_dir, spec=spec, balance_classes=True)


def test_classes_in_sub_folders(data_dir):
    """Whatever these are called: the folder beside images decides."""
    write_class_masks(data_dir / TRAIN)
    spec = ConditionSpec(use_hv_map=True, class_cond=True, num_classes=3)
    flat = dataset(data_dir, spec=spec, balance_classes=True)
    labels = [flat[0, index][1]["label"] for index in range(8)]
    order = [*range(1, 8, 2), *range(0, 8, 2)]
    for name in ("images", "inst_masks", "bin_masks", "class_masks"):
        for number, path in enumerate(sorted((data_dir / TRAIN / name).iterdir())):
            place = data_dir / TRAIN / name / ("class_masks" if number % 2 else "other/bin_masks") / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    deep = dataset(data_dir, spec=spec, balance_classes=True)
    assert [Path(item.image).name for item in deep.items] == [Path(flat.items[i].image).name for i in order]
    np.testing.assert_array_equal(deep.weights, flat.weights[order])
    for number, index in enumerate(order):
        np.testing.assert_array_equal(deep[0, number][1]["label"], labels[index])
    (data_dir / TRAIN / "class_masks").rename(data_dir / "elsewhere")
    with pytest.raises(ValueError, match=r"--balance_classes True: .*class_masks/slide-0_001.png has no classes in"):
        dataset(data_dir, spec=spec, balance_classes=True)


def test_appearance_by_features(data_dir):
    write_patches(data_dir / TRAIN, count=40)
    vectors = np.arange(40.0)[:, None] ** 2
    asked = []

    def features(paths):
        asked.extend(paths)
        return vectors

    matched = dataset(data_dir, match_app=True, features=features)
    assert asked == [item.image for item in matched.items]
    np.testing.assert_array_equal(matched.appearance, data_util.match_app(vectors, 0))
    assert abs(matched.appearance - np.arange(40)).max() <= 20


def test_other_slides_need_something_to_match_by(data_dir):
    with pytest.raises(ValueError, match="--match_other_slide True needs --match_struct True or --match_app True"):
        dataset(data_dir, match_other_slide=True)


@pytest.mark.parametrize("match_struct", [False, True])
def test_appearance_of_images_without_masks(data_dir, tmp_path, match_struct):
    write_images(tmp_path / "other", count=30, first=100)
    options = dict(appearance_dir=str(tmp_path / "other"), match_struct=match_struct)
    own, again = dataset(data_dir, **options), dataset(data_dir, **options)
    np.testing.assert_array_equal(own.appearance, again.appearance)
    assert len(own) == 8 and len(set(own.appearance)) > 3
    for index in range(8):
        x, cond = one(own, 0, index)
        number = int(own.appearance[index]) - 8
        np.testing.assert_array_equal(((x + 1) * 127.5).round().permute(1, 2, 0), draw_patch(100 + number)[0])
        assert cond["path"] == own.sources[8 + number].image
        np.testing.assert_array_equal(cond["label"].permute(1, 2, 0), gen_instance_hv_map(draw_patch(index)[1]))
    assert own.read(8).nbytes == 3 * 32 * 32
    if match_struct:
        histograms = [data_util.haematoxylin_histogram(draw_patch(100 + k)[0]) for k in range(30)]
        estimates = data_util.nuclear_shares(np.array(histograms), [f"{k // 4}" for k in range(100, 130)])
        shares = np.array([(draw_patch(k)[1] > 0).mean() for k in range(8)])
        np.testing.assert_array_equal(own.appearance, 8 + data_util.match_shares(shares, estimates, 0))


@pytest.mark.parametrize("augment", [False, True])
def test_images_without_masks_are_samples(data_dir, tmp_path, augment):
    """They come after the others, in streams as in the data set, and change nothing about these."""
    write_images(tmp_path / "other", count=5)
    looks = dict(augment=augment, stain_jitter=0.3 * augment, preserve_nuclei_col=True, ids=False, seed=3)
    marked = replace(SPEC, mark_unknown=True)
    own = dataset(data_dir, spec=marked, unlabelled_dir=str(tmp_path / "other"), **looks)
    plain = dataset(data_dir, spec=marked, **looks)
    assert len(own) == len(plain) == 8 and own.unlabelled == 5 and own.read(8).nbytes == 3 * 32 * 32
    assert_same_batch(default_collate([own[2, k] for k in range(8)]), default_collate([plain[2, k] for k in range(8)]))
    images, cond = default_collate([own[2, k] for k in (3, 8, 12)])
    assert cond["unknown"].flatten().tolist() == [False, True, True]
    assert [path[-16:] for path in cond["path"][1:]] == ["other-50_000.png", "other-51_000.png"]
    assert not cond["label"][1:].any() and not cond["edge"][1:].any() and cond["label"][0].any()
    for k, seed in ((1, 200), (2, 204)):
        colours = [sorted(part[k].flatten(1).T.tolist()) for part in (images, cond["col_map"])]
        drawn = sorted(draw_patch(seed)[0].reshape(-1, 3).tolist())
        assert colours[0] == colours[1] and (colours[0] == drawn) != augment
    seen = [cond["index"] for _, cond in itertools.islice(stream(own, 4, unlabelled_share=0.25), 10)]
    assert all((batch >= 8).sum() == 1 for batch in seen) and len({int(batch.max()) for batch in seen[:5]}) == 5


def test_many_images_without_masks_are_not_kept(data_dir, tmp_path, monkeypatch):
    """More than fill half of the memory would be read anew nearly every time."""
    write_images(tmp_path / "other", count=5)
    for limit, kept in ((5 * 3072 * 2, True), (5 * 3072 * 2 - 2, False)):
        monkeypatch.setattr(image_datasets, "CACHE_BYTES", limit)
        own = dataset(data_dir, spec=replace(SPEC, mark_unknown=True), unlabelled_dir=str(tmp_path / "other"))
        assert any(index >= 8 for index in own._cache) == kept


@pytest.mark.parametrize("option", ["match_app", "match_other_slide", "shuffle_masks"])
def test_images_without_masks_are_not_matched_otherwise(data_dir, option):
    with pytest.raises(ValueError, match=f"--appearance_dir {data_dir} with --match_app, --match_other_slide or"):
        dataset(data_dir, appearance_dir=str(data_dir), **{option: True})


def test_matching_needs_a_second_image(tmp_path):
    write_patches(tmp_path / TRAIN, count=1)
    with pytest.raises(ValueError, match="--match_struct"):
        dataset(tmp_path, match_struct=True)


def test_subsample_is_the_legacy_choice(data_dir):
    kept = dataset(data_dir, subsample=0.5)
    chosen = np.random.RandomState(42).choice(8, 4, replace=False)
    assert [item.stem for item in kept.items] == [dataset(data_dir).items[i].stem for i in sorted(chosen)]


# ---- what is held out ----


def test_held_out_slides_are_not_trained_on(tmp_path):
    write_patches(tmp_path / TRAIN, count=16)
    everything, training, held_out = (
        [item.stem for item in dataset(tmp_path, val_share=0.25, seed=1, part=part).items]
        for part in ("", "train", "held_out")
    )
    assert len(held_out) == 4 and len({stem[:7] for stem in held_out}) == 1
    assert [stem for stem in everything if stem not in held_out] == training


def test_two_slides_are_all_for_training(data_dir):
    assert len(dataset(data_dir, val_share=0.25, part="train")) == 8
    assert not len(dataset(data_dir, val_share=0.25, part="held_out"))


# ---- mistakes ----


def spoil(data_dir, what):
    folder = data_dir / TRAIN
    image, mask, inst = (
        folder / name for name in ("images/slide-0_001.png", "bin_masks/slide-0_001.png", "inst_masks/slide-0_001.tif")
    )
    if what == "no mask":
        mask.unlink()
    elif what == "no image":
        image.unlink()
    elif what == "sizes":
        Image.fromarray(np.zeros((30, 32), np.int32)).save(inst)
    elif what == "small":
        Image.fromarray(np.zeros((31, 32, 3), np.uint8)).save(image)
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:400])
    elif what == "text":
        image.write_text("not an image")
    elif what == "float":
        Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(inst)
    elif what == "negative":
        Image.fromarray(np.full((32, 32), -1, np.int32)).save(inst)
    elif what == "colour mask":
        Image.fromarray(draw_patch(0)[0]).save(mask)
    elif what == "deep image":
        Image.fromarray(np.zeros((32, 32), np.uint16)).save(image)
    elif what == "twins":
        (folder / "images" / "slide-0_001.tif").write_bytes(b"")
    elif what == "dangling":
        image.unlink()
        image.symlink_to(folder / "nowhere.png")
    elif what == "empty":
        for path in (folder / "images").iterdir():
            path.unlink()
    elif what == "no folders":
        for name in ("bin_masks", "inst_masks"):
            (folder / name).rename(folder / f"old_{name}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no mask", "slide-0_001.png has no mask"),
        ("no image", "slide-0_001.* has no image"),
        ("sizes", "32 x 30 px.*one size"),
        ("small", "smaller than --image_size 32"),
        ("truncated", "slide-0_001.png cannot be decoded"),
        ("text", "slide-0_001.png is not an image"),
        ("float", "slide-0_001.tif holds floating-point numbers"),
        ("negative", "slide-0_001.tif holds negative numbers"),
        ("colour mask", "slide-0_001.png is a colour image"),
        ("deep image", "not 8 bits"),
        ("twins", "share a stem"),
        ("dangling", "slide-0_001.png"),
        ("empty", "holds no image"),
        ("no folders", "has no inst_masks or bin_masks"),
    ],
)
def test_mistakes_are_named(data_dir, what, message):
    spoil(data_dir, what)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataset(data_dir)


def test_struct_and_shuffle_contradict(data_dir):
    with pytest.raises(ValueError, match="--match_struct True with --shuffle_masks True"):
        dataset(data_dir, match_struct=True, shuffle_masks=True)


def test_some_files_are_read_at_the_start(data_dir, monkeypatch):
    """What is wrong with others shows when they are read, in a worker, too: one line that names the file."""
    spoil(data_dir, "truncated")
    monkeypatch.setattr(image_datasets, "CHECKED", 4)
    assert sorted(dataset(data_dir)._cache) == [0, 2, 4, 6]
    for workers in (0, 2):
        data = stream(dataset(data_dir), 4, num_workers=workers)
        with pytest.raises(ValueError, match=r"slide-0_001\.png cannot be decoded") as caught:
            list(itertools.islice(data, 3))
        assert "Traceback" not in str(caught.value)
    with pytest.raises(ValueError, match="slide-0_001.png cannot be decoded"):
        dataset(data_dir, match_struct=True)


def test_classes_of_cells_by_the_references_keywords(data_dir):
    """Where nothing says how many classes there are."""
    train = data_dir / "MoNuSegTrainingData"
    (train / "bin_masks").rename(train / "class_masks")
    data = load_data(
        data_dir=str(data_dir),
        dataset_mode="monuseg",
        batch_size=2,
        image_size=16,
        class_cond=True,
        use_hv_map=True,
        deterministic=True,
    )
    _, cond = next(data)
    assert sorted(cond["classes"].unique().tolist()) == [0, 255]


@pytest.mark.parametrize("class_cond", [False, True])
def test_by_the_references_keywords(data_dir, class_cond):
    """As its training script asks for data, and without the channels that a model would want."""
    options = dict(random_crop=True, random_flip=True, is_train=True, class_cond=class_cond, use_hv_map=not class_cond)
    data = load_data(
        dataset_mode="monuseg", data_dir=str(data_dir), batch_size=3, image_size=32, use_col_map=True, **options
    )
    batch, cond = next(data)
    assert batch.dtype == cond["col_map"].dtype == th.float32 and batch.shape == cond["col_map"].shape == (3, 3, 32, 32)
    assert -1 <= batch.min() < batch.max() <= 1
    assert cond["label"].shape == (3, 1 if class_cond else 2, 32, 32) and cond["instance"].shape == (3, 1, 32, 32)
    assert len(cond["path"]) == 3 and cond["label_ori"].shape == (3, 32, 32)
    assert len(list(itertools.islice(data, 5))) == 5


@pytest.mark.parametrize(
    ("size", "number", "message"),
    [((19, 20), 1, "made.png is 19 x 20 px, .*made.tif 20 x 20: they"), ((20, 20), 257, "class id 257 is out of")],
)
def test_classes_of_a_structure_that_will_not_do(tmp_path, size, number, message):
    for name in ("inst_masks", "class_masks"):
        (tmp_path / name).mkdir()
    Image.new("I;16", (20, 20), 1).save(tmp_path / "inst_masks/made.tif")
    Image.new("I;16", size, number).save(tmp_path / "class_masks/made.png")
    (item,) = list_structures(str(tmp_path), "--structure_dir", classes=True)
    spec = ConditionSpec(class_cond=number > 1, use_hv_map=number > 1, num_classes=3 if number > 1 else 2)
    with pytest.raises(ValueError, match=message):
        read_structure(item, spec, 16, 0.0)


def test_a_patch_with_no_nucleus(data_dir):
    folder = data_dir / TRAIN
    Image.fromarray(np.zeros((32, 32), np.int32)).save(folder / "inst_masks" / "slide-0_001.tif")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(folder / "bin_masks" / "slide-0_001.png")
    for options in ({}, {"match_struct": True}, {"match_app": True}, {"augment": True, "preserve_nuclei_col": True}):
        _, cond = one(dataset(data_dir, **options), 0, 1)
        assert (cond["label"] == 0).all()


# ---- real data ----


@pytest.mark.slow
def test_real_instance_masks(monuseg):
    """The 17 slides with masks, as they are: whole 1000 px images, cropped at random."""
    whole = load_dataset(
        data_dir=str(monuseg / "masks"), dataset_mode="monuseg", image_size=128, spec=SPEC, augment=True, match_app=True
    )
    assert len(whole) == 17
    for index in range(0, 17, 4):
        x, cond = one(whole, 0, index)
        assert x.shape == (3, 128, 128) and cond["label"].abs().max() <= 1
