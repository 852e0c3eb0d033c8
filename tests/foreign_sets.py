"""Data sets of a few KB in the layouts that they are published in, drawn here."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
from conftest import draw_patch
from PIL import Image

from guided_diffusion.cell_classes import painted

SIZE = 32


@dataclass
class Scene:
    """An image, its instances (ids with gaps) and the class of each."""

    image: np.ndarray
    inst_map: np.ndarray
    of_nucleus: dict[int, int]

    @property
    def class_map(self) -> np.ndarray:
        return painted(self.inst_map, self.of_nucleus)


def scene(seed: int, classes: int = 5) -> Scene:
    image, inst_map = draw_patch(seed, SIZE)
    ids = np.unique(inst_map[inst_map > 0]).tolist()
    return Scene(image, inst_map, {nucleus: 1 + (seed + k) % classes for k, nucleus in enumerate(ids)})


@dataclass
class Expected:
    """What an import of a set must give: scenes by name, splits and slides of these, and what is recorded."""

    scenes: dict[str, Scene]
    slides: dict[str, str]
    test: set[str]
    classes: list[str]
    mpp: str
    exact: bool = True  # whether ids are kept


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def save_mat(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays, do_compression=True)


def channels(one: Scene) -> np.ndarray:
    """PanNuke's six channels: ids begin anew, from 1, in each; the last is background."""
    mask = np.zeros((SIZE, SIZE, 6))
    for number in range(1, 6):
        ids = [nucleus for nucleus, class_id in one.of_nucleus.items() if class_id == number]
        for place, nucleus in enumerate(ids, 1):
            mask[one.inst_map == nucleus, number - 1] = place
    mask[..., 5] = one.inst_map == 0
    return mask


TISSUES = ("Breast", "Bile-duct", "Breast")
PANNUKE = ["neoplastic", "inflammatory", "connective", "dead", "epithelial"]
CONIC = ["neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective"]


def pannuke(root: Path, layout: str = "published") -> Expected:
    scenes, slides = {}, {}
    for fold in (1, 3):
        own = [scene(10 * fold + k) for k in range(3)]
        own[2] = Scene(own[2].image, 0 * own[2].inst_map, {})
        images, masks = {
            "published": (root / f"Fold {fold}/images/fold{fold}", root / f"Fold {fold}/masks/fold{fold}"),
            "flat": (root / f"fold{fold}",) * 2,
            "hover-next": (root / f"images/fold{fold}", root / f"masks/fold{fold}"),
        }[layout]
        save_npy(images / "types.npy", np.array(TISSUES))
        if layout == "hover-next":
            save_npy(images / "images.npy", np.stack([one.image for one in own]))
            labels = [np.stack([one.inst_map, one.class_map], axis=2) for one in own]
            save_npy(masks / "labels.npy", np.stack(labels).astype(np.int32))
        else:
            save_npy(images / "images.npy", np.stack([one.image for one in own]).astype(float))
            save_npy(masks / "masks.npy", np.stack([channels(one) for one in own]))
        for index, (one, tissue) in enumerate(zip(own, TISSUES)):
            name = f"fold{fold}-{tissue}_{index:04d}"
            scenes[name], slides[name] = one, f"fold{fold}-{tissue}"
    test = {name for name in scenes if name.startswith("fold3")}
    return Expected(scenes, slides, test, PANNUKE, "0.25", exact=layout == "hover-next")


def consep(root: Path, top: str = "CoNSeP") -> Expected:
    scenes = {}
    for name in ("train_1", "train_2", "test_1"):
        one, folder = scene(len(scenes), 7), root / top / ("Test" if name.startswith("test") else "Train")
        save(folder / "Images" / f"{name}.png", one.image)
        ids = np.array([*one.of_nucleus.items()]).reshape(-1, 2)
        save_mat(
            folder / "Labels" / f"{name}.mat",
            inst_map=one.inst_map.astype(float),
            type_map=one.class_map.astype(float),
            inst_type=ids[:, 1:].astype(float),
            inst_centroid=np.zeros((len(ids), 2)),
        )
        scenes[name] = one
    names = "other,inflammatory,healthy epithelial,malignant epithelial,fibroblast,muscle,endothelial".split(",")
    return Expected(scenes, {name: name for name in scenes}, {"test_1"}, names, "0.25")


def conic(root: Path) -> Expected:
    names = ("consep_1-0000", "consep_1-0001", "dpath_2-0000")
    scenes = {name.replace("-", "_"): scene(k, 6) for k, name in enumerate(names)}
    own = list(scenes.values())
    save_npy(root / "images.npy", np.stack([one.image for one in own]))
    save_npy(root / "labels.npy", np.stack([np.stack([o.inst_map, o.class_map], 2) for o in own]).astype(np.uint16))
    (root / "patch_info.csv").write_text("patch_info\n" + "\n".join(names) + "\n")
    (root / "counts.csv").write_text(",".join(CONIC) + "\n")
    return Expected(scenes, {name: name.rpartition("_")[0] for name in scenes}, set(), CONIC, "0.5")


def lizard(root: Path) -> Expected:
    labels, rows, scenes = root / "lizard_labels/Lizard_Labels", [], {}
    for k, (name, split) in enumerate((("consep_1", 1), ("crag_2", 2), ("glas_3", 3))):
        one = scene(k, 6)
        ids = list(one.of_nucleus)[::-1]  # in any order
        save(root / f"lizard_images{1 + k % 2}/Lizard_Images{1 + k % 2}/{name}.png", one.image)
        types = np.array([one.of_nucleus[nucleus] for nucleus in ids])
        save_mat(
            labels / "Labels" / f"{name}.mat",
            inst_map=one.inst_map,
            id=np.array(ids).reshape(-1, 1),
            **{"class": types.reshape(-1, 1), "bbox": np.zeros((len(ids), 4)), "centroid": np.zeros((len(ids), 2))},
        )
        scenes[name] = one
        rows.append({"Filename": name, "Source": "x", "Split": split})
    with open(labels / "info.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["Filename", "Source", "Split"])
        writer.writeheader()
        writer.writerows(rows)
    return Expected(scenes, {name: name for name in scenes}, {"glas_3"}, CONIC, "0.5")


def kumar(root: Path) -> Expected:
    scenes = {}
    for part in ("train", "test_same", "test_diff"):
        one, name = scene(len(scenes)), f"TCGA-{part}"
        save(root / part / "Images" / f"{name}.tif", one.image)
        save_mat(root / part / "Labels" / f"{name}.mat", inst_map=one.inst_map.astype(float))
        scenes[name] = one
    return Expected(scenes, {n: n for n in scenes}, {"TCGA-test_same", "TCGA-test_diff"}, [], "0.25")


def tnbc(root: Path) -> Expected:
    scenes = {}
    for patient, number in ((1, 1), (1, 2), (2, 1)):
        one = Scene(scene(patient + 5 * number).image, np.zeros((SIZE, SIZE), np.int32), {})
        for k, (top, left) in enumerate(((2, 2), (2, 20), (20, 8)), 1):
            one.inst_map[top : top + 6, left : left + 7 + number] = k
        opaque = np.full((SIZE, SIZE, 1), 255, np.uint8)
        folder, name = root / "TNBC_NucleiSegmentation", f"{patient:02d}_{number}.png"
        save(folder / f"Slide_{patient:02d}" / name, np.concatenate([one.image, opaque], axis=2))
        save(folder / f"GT_{patient:02d}" / name, np.where(one.inst_map > 0, 255, 0).astype(np.uint8))
        scenes[f"tnbc-{patient:02d}_{number:04d}"] = one
    return Expected(scenes, {name: name.rpartition("_")[0] for name in scenes}, set(), [], "0.25", exact=False)


def nuinsseg(root: Path) -> Expected:
    scenes = {}
    for organ, number in (("human bladder", 1), ("human bladder", 2), ("mouse liver", 1)):
        one, stem = scene(number + len(organ)), f"{organ.replace(' ', '_')}_{number:02d}"
        save(root / organ / "tissue images" / f"{stem}.png", one.image)
        save(root / organ / "label masks modify" / f"{stem}.tif", one.inst_map.astype(np.uint16))
        save(root / organ / "label masks" / f"{stem}.tif", one.inst_map.astype(np.uint16) + 1)
        save(root / organ / "mask binary" / f"{stem}.png", (one.inst_map > 0).astype(np.uint8))
        scenes[f"{organ.replace(' ', '-')}_{number:04d}"] = one
    return Expected(scenes, {name: name.rpartition("_")[0] for name in scenes}, set(), [], "")


SECOND = "Annotator 1 (biologist second round of manual marks up)"
THIRD = "Annotator 2 (bioinformatician)"


def cryonuseg(root: Path, annotator: str = "biologist") -> Expected:
    folders = {
        "biologist": "Annotator 1 (biologist)",
        "second": f"{SECOND}/{SECOND}",
        "bioinformatician": f"{THIRD}/{THIRD}",
    }
    scenes = {}
    for k, stem in enumerate(("Human_AdrenalGland_01", "Human_Larynx_02")):
        image = scene(k).image
        save(root / "tissue images" / f"{stem}.tif", image)
        for place, (name, folder) in enumerate(folders.items()):
            one = Scene(image, scene(10 * place + k).inst_map, {})
            save(root / folder / "label masks modify" / f"{stem}.tif", one.inst_map.astype(np.uint16))
            save(root / folder / "label masks" / f"{stem}.tif", one.inst_map.astype(np.uint16) + 1)
            if name == annotator:
                scenes[stem] = one
    return Expected(scenes, {name: name for name in scenes}, set(), [], "0.25")


def cellpose(root: Path) -> Expected:
    scenes = {}
    for name, image, mask in (
        ("train/a", "a_img.png", "a_masks.png"),
        ("train/b", "b.tif", "b_masks.tif"),
        ("test/c", "c.png", "c_cp_masks.png"),
    ):
        one, folder = scene(len(scenes)), root / Path(name).parent
        save(folder / image, one.image)
        save(folder / mask, one.inst_map.astype(np.uint16))
        scenes[Path(name).name] = one
    save(root / "train" / "b_cp_masks.png", np.zeros((SIZE, SIZE), np.uint16))  # what was drawn goes before
    save(root / "train" / "b_outlines_cp_masks.png", scenes["b"].image)
    save(root / "train" / "b_flows.tif", scenes["b"].image)
    (root / "train" / "b_seg.npy").write_bytes(b"not read")
    return Expected(scenes, {name: name for name in scenes}, {"c"}, [], "")


def stardist(root: Path) -> Expected:
    scenes = {}
    for split, name in (("train", "a"), ("train", "b"), ("test", "c")):
        one = scene(len(scenes))
        save(root / split / "images" / f"{name}.tif", one.image)
        save(root / split / "masks" / f"{name}.tif", one.inst_map.astype(np.uint16))
        scenes[name] = one
    return Expected(scenes, {name: name for name in scenes}, {"c"}, [], "")


def runs(inside: np.ndarray) -> list[int]:
    """Run lengths in the order of columns, the first of background."""
    flat = np.concatenate([[False], inside.ravel(order="F"), [None]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *edges]).tolist()


def coco(root: Path, packed: bool = False) -> Expected:
    """Categories are numbered from 0, so they are numbered anew; images of equal names lie in two folders."""
    scenes = {}
    for split, name in (("train2017", "a"), ("train2017", "b"), ("val_test", "c")):
        one = scene(len(scenes), 2)
        ids = {nucleus: place for place, nucleus in enumerate(one.of_nucleus, 1)}
        one = Scene(
            one.image, painted(one.inst_map, ids).astype(np.int32), {ids[k]: v for k, v in one.of_nucleus.items()}
        )
        save(root / split / f"{name}.png", one.image)
        scenes[name] = one
    for split, names in (("train2017", "ab"), ("val_test", "c")):
        rows = [
            {
                "id": 100 * k + nucleus,
                "image_id": k,
                "category_id": class_id - 1,
                "iscrowd": 0,
                "segmentation": {"size": [SIZE, SIZE], "counts": encoded(scenes[name].inst_map == nucleus, packed)},
            }
            for k, name in enumerate(names)
            for nucleus, class_id in scenes[name].of_nucleus.items()
        ]
        table = {
            "images": [{"id": k, "file_name": f"{n}.png", "width": SIZE, "height": SIZE} for k, n in enumerate(names)],
            "annotations": rows,
            "categories": [{"id": 0, "name": "round"}, {"id": 1, "name": "long"}],
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(table))
    return Expected(scenes, {name: name for name in scenes}, {"c"}, ["round", "long"], "")


def encoded(inside: np.ndarray, packed: bool) -> list[int] | str:
    if not packed:
        return runs(inside)
    from pycocotools import mask

    return mask.encode(np.asfortranarray(inside, np.uint8))["counts"].decode()


WRITERS = {
    **{f.__name__: f for f in (pannuke, consep, conic, lizard, kumar, tnbc, nuinsseg, cryonuseg, cellpose, stardist)},
    "coco": coco,
}
