"""The condition's layout, its parts and its pictures."""

import itertools

import numpy as np
import pytest
import torch as th
from torch.utils.data import default_collate

from guided_diffusion.conditioning import ConditionSpec, as_signed, dealt, instance_edges, shuffled_order
from guided_diffusion.hv_maps import gen_instance_hv_map

README = ConditionSpec(use_hv_map=True, use_col_map=True, num_classes=6)


def example(size=16, channels=3, seed=0):
    """An image, a class map and an instance map with two touching nuclei and one alone."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, size, channels), dtype=np.uint8)
    inst = np.zeros((size, size), np.int32)
    inst[2:8, 2:8] = 300
    inst[2:8, 8:13] = 7
    inst[10:16, 4:11] = 12
    return image, (inst > 0).astype(np.uint8) * 255, inst


def generator(seed):
    return th.Generator().manual_seed(seed)


def encoded(spec, image, class_map, inst, generator, preserve=False, ids=True):
    """One sample's parts as a batch."""
    return default_collate([spec.encode(image.transpose(2, 0, 1), class_map, inst, generator, preserve, ids=ids)])


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"num_classes": 2}, "mask edge"),
        ({"num_classes": 1, "no_instance": True}, "mask"),
        ({"num_classes": 3, "use_hv_map": True}, "hv_x hv_y edge"),
        ({"num_classes": 6, "use_hv_map": True, "use_col_map": True}, "hv_x hv_y colour_r colour_g colour_b edge"),
        ({"num_classes": 3, "use_col_map": True, "in_channels": 1}, "mask colour edge"),
        ({"num_classes": 3, "class_cond": True}, "class_0 class_1 class_2 edge"),
        ({"num_classes": 2, "class_cond": True, "no_instance": True}, "class_0 class_1"),
        (
            {"num_classes": 2, "class_cond": True, "use_col_map": True},
            "class_0 class_1 edge colour_r colour_g colour_b",
        ),
        (
            {"num_classes": 2, "class_cond": True, "use_hv_map": True, "use_col_map": True},
            "hv_x hv_y class_0 class_1 edge colour_r colour_g colour_b",
        ),
    ],
)
def test_layout(flags, names):
    assert " ".join(ConditionSpec(**flags).channel_names) == names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_classes": 5, "use_hv_map": True, "use_col_map": True}, "hv_x, hv_y, colour_r.*--num_classes 6"),
        ({"num_classes": 6, "use_hv_map": True, "use_col_map": True, "no_instance": True}, "--num_classes 5"),
        ({"num_classes": 3, "in_channels": 2}, "--in_channels 2"),
        ({"num_classes": 0, "class_cond": True}, "--num_classes 0"),
        ({"num_classes": 10**10, "class_cond": True}, r"--num_classes 10000000000 must lie in \[1, 65536\]"),
        ({"num_classes": 257, "class_cond": True, "use_hv_map": True}, "class masks tell 255 classes of cells apart"),
        ({"num_classes": 2, "mpp": 1e-200}, "--mpp 1e-200: give micrometres"),
        (
            {"num_classes": 1, "no_instance": True, "mark_unknown": True},
            "--no_instance True leaves out the edge channel",
        ),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ConditionSpec(**flags)


@pytest.mark.parametrize("mark_unknown", [False, True])
@pytest.mark.parametrize("use_col_map", [False, True])
@pytest.mark.parametrize("no_instance", [False, True])
@pytest.mark.parametrize(
    "structure",
    [
        {"use_hv_map": True},
        {},
        {"class_cond": True, "num_classes": 5},
        {"class_cond": True, "num_classes": 5, "use_hv_map": True},
    ],
)
def test_it_is_told_from_a_batch_and_the_models_channels(structure, no_instance, use_col_map, mark_unknown):
    mark_unknown = mark_unknown and not no_instance
    size = (2, 8, 8)
    channels = (2 if structure.get("use_hv_map") else 1) + 3 * use_col_map + (not no_instance)
    flags = {"num_classes": channels, **structure, "use_col_map": use_col_map, "no_instance": no_instance}
    spec = ConditionSpec(**flags, mark_unknown=mark_unknown)
    cond = {"label": th.zeros(2, 2 if spec.use_hv_map else 1, 8, 8), "instance": th.zeros(2, 1, 8, 8, dtype=th.int32)}
    if spec.cell_classes:
        cond["classes"] = th.zeros(2, 1, 8, 8, dtype=th.uint8)
    if spec.class_cond:
        cond["label"] = cond["label"] if spec.cell_classes else cond["label"].long()
        if no_instance:
            del cond["instance"]  # as the reference's data have it then
    if use_col_map:
        cond["col_map"] = th.zeros(2, 3, 8, 8)
    if mark_unknown:
        cond["unknown"] = th.tensor([[False], [True]])
    assert ConditionSpec.of(cond, spec.channels) == spec
    assert spec.assemble(cond).shape == (2, spec.channels, *size[1:])


def test_assembled_in_the_reference_order():
    image, class_map, inst = example()
    y = README.assemble(encoded(README, image, class_map, inst, generator(3)))
    assert y.shape == (1, 6, 16, 16) and y.dtype == th.float32
    np.testing.assert_array_equal(y[0, :2].permute(1, 2, 0), gen_instance_hv_map(inst))
    drawn = README.render(y)[0][:, 32:48]  # after the HV map's two panels
    assert np.array_equal(np.sort(drawn.reshape(-1, 3), axis=0), np.sort(image.reshape(-1, 3), axis=0))
    colours = ((y[0, 2:5] + 1) * 127.5).round().to(th.uint8).permute(1, 2, 0).reshape(-1, 3).numpy()
    assert sorted(map(tuple, colours)) == sorted(map(tuple, image.reshape(-1, 3)))
    np.testing.assert_array_equal(y[:, 5:], instance_edges(th.from_numpy(inst)[None, None]))


def test_mask_is_zero_one_whatever_is_stored():
    image, class_map, inst = example()
    spec = ConditionSpec(num_classes=2)
    for stored in (class_map, class_map // 255):
        y = spec.assemble(encoded(spec, image, stored, inst, generator(0)))
        np.testing.assert_array_equal(y[0, 0], inst > 0)


def test_cells_have_shapes_and_classes():
    """HV maps, classes one-hot, edges, colours; all but the colours go with an unknown structure."""
    image, _, inst = example()
    classes = np.where(inst == 7, 2, (inst > 0).astype(int)).astype(np.uint8)
    spec = ConditionSpec(class_cond=True, num_classes=3, use_hv_map=True, use_col_map=True, mark_unknown=True)
    parts = encoded(spec, image, classes, inst, generator(0))
    y = spec.assemble(parts)
    assert y.shape[1] == 2 + 3 + 1 + 3
    np.testing.assert_array_equal(y[0, :2].permute(1, 2, 0), gen_instance_hv_map(inst))
    np.testing.assert_array_equal(y[0, 2:5].argmax(0), classes)
    assert (y[0, 2:5].sum(0) == 1).all()
    np.testing.assert_array_equal(y[:, 5:6], instance_edges(th.from_numpy(inst)[None, None]))
    dropped = spec.assemble({**parts, "unknown": th.tensor([[True]])})
    assert not dropped[:, :5].any() and (dropped[:, 5] == -1).all() and th.equal(dropped[:, 6:], y[:, 6:])
    assert len(spec.render(y)[0][0]) == 16 * 5  # H, V, classes, edges, colours


def test_one_hot_classes_then_edge_then_colour():
    image, _, inst = example()
    classes = np.where(inst == 7, 2, (inst > 0).astype(int)).astype(np.uint8)
    spec = ConditionSpec(class_cond=True, num_classes=3, use_col_map=True)
    y = spec.assemble(encoded(spec, image, classes, inst, generator(0)))
    for k in range(3):
        np.testing.assert_array_equal(y[0, k], classes == k)
    np.testing.assert_array_equal(y[0, 3], instance_edges(th.from_numpy(inst)[None, None])[0, 0])
    assert y.shape[1] == 7


def test_class_out_of_range():
    spec = ConditionSpec(class_cond=True, num_classes=3)
    spec.check_classes(np.array([[0, 2]]), "m.png")
    with pytest.raises(ValueError, match=r"m\.png: class id 3 .*--num_classes 3"):
        spec.check_classes(np.array([[0, 3]]), "m.png")


@pytest.mark.parametrize("spec", [README, ConditionSpec(no_instance=True, num_classes=1)])
def test_without_ids_it_is_the_same_condition_in_fewer_bytes(spec):
    with_ids, without = (encoded(spec, *example(), generator(0), ids=ids) for ids in (True, False))
    assert th.equal(spec.assemble(with_ids), spec.assemble(without))
    added = {"edge"} if "edge" in spec.channel_names else set()
    assert without.keys() == with_ids.keys() - {"instance", "label_ori"} | added
    assert sum(part.nbytes for part in without.values()) < 0.7 * sum(part.nbytes for part in with_ids.values())


class Watched(dict):
    """Parts of a batch that tell which of them were taken."""

    def __init__(self, parts):
        super().__init__(parts)
        self.taken = set()

    def __getitem__(self, name):
        self.taken.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(
    "flags",
    [
        dict(use_hv_map=True, use_col_map=True, num_classes=6),
        dict(use_hv_map=True, class_cond=True, num_classes=3, no_instance=True),
        dict(class_cond=True, num_classes=3),
        dict(use_hv_map=True, use_col_map=True, num_classes=6, mark_unknown=True),
    ],
)
@pytest.mark.parametrize("ids", [True, False])
def test_parts_are_those_that_assemble_takes(flags, ids):
    spec, (image, _, inst) = ConditionSpec(**flags), example()
    parts = encoded(spec, image, (inst > 0).astype(np.uint8), inst, generator(0), ids=ids)
    batch = Watched(parts | {"index": th.zeros(1), "unknown": th.ones(1, dtype=th.bool)})
    spec.assemble(batch)
    assert sorted(batch.taken) == sorted(spec.parts(batch))


def test_edges_by_brute_force():
    inst = np.random.default_rng(1).integers(0, 3, (9, 11))
    expected = np.zeros(inst.shape)
    for r, c in itertools.product(range(9), range(11)):
        for dr, dc in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            if 0 <= r + dr < 9 and 0 <= c + dc < 11 and inst[r, c] != inst[r + dr, c + dc]:
                expected[r, c] = 1
    np.testing.assert_array_equal(instance_edges(th.from_numpy(inst)[None, None])[0, 0], expected)
    np.testing.assert_array_equal(instance_edges(inst), expected)
    assert expected.min() == 0 and expected.max() == 1


def test_colours_keep_to_their_side():
    _, class_map, _ = example()
    mask = class_map > 0
    order = shuffled_order(mask.shape, mask, generator(0))
    for side in (mask, ~mask):
        np.testing.assert_array_equal(np.sort(order[side.ravel()]), np.flatnonzero(side))
    assert (order != np.arange(mask.size)).any()
    free = shuffled_order(mask.shape, None, generator(0))
    np.testing.assert_array_equal(np.sort(free), np.arange(mask.size))
    assert not mask.ravel()[free[mask.ravel()]].all()


def test_shuffle_depends_on_the_generator_alone():
    first, second, other = (shuffled_order((16, 16), None, generator(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_field_has_the_colours_of_nuclei_where_these_are(channels):
    """Each part of it as many as nuclei take there, in no place of their own; and none that the image has not."""
    inst = np.zeros((40, 52), np.int32)
    inst[3:15, 5:19], inst[30:40, 40:52] = 4, 9
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(150, 256, (1, *inst.shape), dtype=np.uint8), channels, axis=0)
    dark = rng.permutation(inst.size)[: (inst > 0).sum()]
    image.reshape(channels, -1)[:, dark] -= 110
    spec = ConditionSpec(use_col_map=True, num_classes=2 + channels, in_channels=channels)
    made = spec.encode(image, inst > 0, inst, generator(1), block=16)["col_map"]
    np.testing.assert_array_equal(np.sort(made.reshape(channels, -1)), np.sort(image.reshape(channels, -1)))
    shown, free = made.min(axis=0) < 150, 0
    for row, column in itertools.product(range(0, 40, 16), range(0, 52, 16)):
        part = slice(row, row + 16), slice(column, column + 16)
        assert shown[part].sum() >= (inst[part] > 0).sum()
        free += (shown[part] & (inst[part] == 0)).sum()
    assert shown[inst == 4].mean() < 0.9 and free > 20
    anywhere = spec.encode(image, inst > 0, inst, generator(1))["col_map"].min(axis=0) < 150
    assert anywhere[:16, 32:].mean() > 0.08 > 0.02 > shown[:16, 32:].mean()


def test_any_pixels_are_dealt_once_each():
    order = np.random.default_rng(0).permutation(20 * 17)
    made = dealt(order, np.zeros(len(order)), np.zeros((20, 17), bool), 8, generator(0))
    np.testing.assert_array_equal(np.sort(made), np.arange(len(order)))


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_colour_map_is_the_image_in_that_order(preserve, channels):
    image, class_map, inst = example(channels=channels)
    spec = ConditionSpec(use_col_map=True, num_classes=2 + channels, in_channels=channels)
    cond = encoded(spec, image, class_map, inst, generator(4), preserve)
    order = shuffled_order(inst.shape, class_map != 0 if preserve else None, generator(4))
    shuffled = image.reshape(-1, channels)[order].reshape(image.shape)
    np.testing.assert_array_equal(cond["col_map"][0], shuffled.transpose(2, 0, 1))


def test_a_known_hv_map_is_taken():
    image, class_map, inst = example()
    known = np.full((2, 16, 16), 0.25, np.float32)
    parts = README.encode(image.transpose(2, 0, 1), class_map, inst, generator(0), hv_map=known)
    np.testing.assert_array_equal(parts["label"], known)


def test_compact_parts():
    image, _, inst = example()
    classes = np.where(inst == 7, 2, (inst > 0).astype(int)).astype(np.uint8)
    spec = ConditionSpec(class_cond=True, num_classes=3, use_col_map=True)
    cond = encoded(spec, image, classes, inst, generator(0))
    for name, (shape, dtype, values) in {
        "label": ((1, 1, 16, 16), th.int32, classes),
        "label_ori": ((1, 16, 16), th.int32, classes),
        "instance": ((1, 1, 16, 16), th.int32, inst),
    }.items():
        assert cond[name].shape == shape and cond[name].dtype == dtype, name
        np.testing.assert_array_equal(cond[name].reshape(16, 16), values)
    assert cond["col_map"].dtype == th.uint8
    mask = encoded(ConditionSpec(num_classes=2), image, classes, inst, generator(0))["label"]
    assert mask.dtype == th.uint8 and mask.max() == 1


@pytest.mark.parametrize("use_hv_map", [False, True])
@pytest.mark.parametrize("others", [{}, {"use_col_map": True}, {"no_instance": True, "in_channels": 1}])
def test_a_layout_without_a_model(use_hv_map, others):
    flags = {**others, "use_hv_map": use_hv_map, "class_cond": False}
    spec = ConditionSpec.for_data(**flags)
    assert spec == ConditionSpec(**flags, num_classes=spec.channels)
    assert ConditionSpec.for_data(**others, class_cond=True).class_cond


def test_every_grey_level():
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(as_signed(th.from_numpy(levels)), levels.astype(np.float32) / 127.5 - 1)
    assert as_signed(th.tensor([0.5])) == 0.5


def test_drop():
    y = th.rand(3, 6, 4, 4) + 1
    dropped = th.tensor([True, False, True])
    out = README.drop(y, dropped)
    assert (out[dropped] == 0).all() and (out[1] == y[1]).all()
    kept_colour = README.drop(y, dropped, drop_hvb_only=True)
    assert (kept_colour[:, 2:5] == y[:, 2:5]).all()
    assert (kept_colour[dropped][:, [0, 1, 5]] == 0).all() and (kept_colour[1] == y[1]).all()


def test_null_is_what_drop_gives():
    y = th.rand(3, 6, 4, 4) + 1
    everything = th.ones(3, dtype=th.bool)
    assert th.equal(README.null(y).expand_as(y), README.drop(y, everything)) and len(README.null(y)) == 1
    assert th.equal(README.null(y, keep_colour=True), README.drop(y, everything, drop_hvb_only=True))


@pytest.mark.parametrize(
    ("flags", "edge", "colour"),
    [
        ({"use_hv_map": True, "use_col_map": True, "num_classes": 6}, 5, slice(2, 5)),
        ({"use_col_map": True, "num_classes": 5}, 4, slice(1, 4)),
        ({"class_cond": True, "use_col_map": True, "num_classes": 3}, 3, slice(4, 7)),
        ({"use_hv_map": True, "num_classes": 3}, 2, slice(0, 0)),
    ],
)
@pytest.mark.parametrize("ids", [False, True])
def test_an_unknown_structure_is_no_empty_one(flags, edge, colour, ids):
    """By hand: zeros with -1 in the edge channel; colours stay, or go where the condition is dropped."""
    image, class_map, inst = example()
    spec, plain = ConditionSpec(**flags, mark_unknown=True), ConditionSpec(**flags)
    maps = [(class_map // 255, inst), (None, None), (0 * inst, 0 * inst)]
    parts = [spec.encode(image.transpose(2, 0, 1), *own, generator(3), True, ids=ids) for own in maps]
    y = spec.assemble(default_collate(parts))
    known = [plain.encode(image.transpose(2, 0, 1), *own, generator(3), True, ids=ids) for own in (maps[0], maps[2])]
    assert th.equal(y[[0, 2]], plain.assemble(default_collate(known)))  # what is known is as without the mark
    expected = th.zeros(y.shape[1:])
    expected[edge] = -1
    expected[colour] = y[2][colour]  # in which all pixels were shuffled together, too
    assert th.equal(y[1], expected) and not th.equal(y[1], y[2])
    (kept,) = spec.drop(y[1:2], th.tensor([True]), drop_hvb_only=True)
    assert th.equal(kept, expected) and th.equal(spec.drop(y, th.zeros(3, dtype=th.bool)), y)
    expected[colour] = 0
    assert th.equal(spec.drop(y, th.tensor([True, True, False])), th.stack([expected, expected, y[2]]))
    assert th.equal(spec.null(y), expected[None])
    expected = expected.repeat(3, 1, 1, 1)
    expected[:, colour] = y[:, colour]
    assert th.equal(spec.null(y, keep_colour=True), expected)
    pictures = np.array(spec.render(y))
    panels = np.split(pictures, pictures.shape[2] // 16, axis=2)
    shown = [panel for panel in panels if (panel[1] != 128).any()]
    assert len(shown) == (colour.stop > 0) and all((panel[[0, 2]] != 128).any() for panel in panels)


def test_split_is_the_inverse_of_assemble():
    y = th.rand(2, 6, 4, 4)
    parts = README.split(y)
    assert {part: values.shape[1] for part, values in parts.items()} == {"structure": 2, "colour": 3, "edge": 1}
    assert (th.cat([parts["structure"], parts["colour"], parts["edge"]], dim=1) == y).all()


def test_no_nucleus_at_all():
    image, _, _ = example()
    empty = np.zeros((16, 16), np.int32)
    y = README.assemble(encoded(README, image, empty, empty, generator(0), True))
    assert (y[:, [0, 1, 5]] == 0).all()
    README.render(y)


@pytest.mark.parametrize(
    ("flags", "panels"),
    [
        ({"num_classes": 6, "use_hv_map": True, "use_col_map": True}, 4),
        ({"num_classes": 2}, 2),
        ({"num_classes": 3, "use_col_map": True, "in_channels": 1}, 3),
        ({"num_classes": 3, "class_cond": True}, 2),
    ],
)
def test_render(flags, panels):
    spec = ConditionSpec(**flags)
    image, class_map, inst = example(channels=spec.in_channels)
    class_map = class_map // 255 if spec.class_cond else class_map
    y = spec.assemble(encoded(spec, image, class_map, inst, generator(0)))
    (picture,) = spec.render(y)
    assert picture.shape == (16, 16 * panels, 3) and picture.dtype == np.uint8
    if not spec.class_cond:
        edge = instance_edges(th.from_numpy(inst)[None, None])[0, 0].numpy() * 255
        np.testing.assert_array_equal(picture[:, -16:, 0], edge)
    if spec.use_hv_map:
        assert tuple(picture[0, 0]) == (124, 255, 121)
    assert spec.legend().count("; ") + 1 + spec.use_hv_map == panels and ("blue" in spec.legend()) == spec.use_hv_map


@pytest.mark.parametrize(("height", "width"), [(5, 7), (40, 30)])
def test_colours_of_an_image_of_another_size(height, width):
    """A map smaller than the image has some of its pixels, each once; a larger one all, equally often but for one."""
    image = np.arange(12 * 9, dtype=np.uint8).reshape(1, 12, 9)
    spec = ConditionSpec(use_col_map=True, in_channels=1, num_classes=3)
    inst = np.zeros((height, width), np.int32)
    made = [spec.encode(image, inst, inst, th.Generator().manual_seed(seed))["col_map"] for seed in (0, 0, 1)]
    assert made[0].shape == (1, height, width) and np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    counts = np.bincount(made[0].ravel(), minlength=12 * 9)
    assert counts.max() - counts.min() <= 1
    half = made[0][:, : height // 2]  # whichever part of the map one looks at
    assert abs(half.mean() - image.mean()) < 4 * image.std() / half.size**0.5
