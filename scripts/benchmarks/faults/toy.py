"""Toy inputs, each made by the program that makes the real ones, and the command of each stage."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

# The smallest model with every kind of layer, and the shortest run.
MODEL = (
    "--image_size 16 --num_channels 32 --channel_mult 1,1 --num_res_blocks 1 --attention_resolutions 8 "
    "--num_head_channels 16 --resblock_updown True --learn_sigma True --noise_schedule cosine --diffusion_steps 20 "
    "--num_classes 6 --use_hv_map True --use_col_map True"
)


@dataclass(frozen=True)
class Stage:
    """
    A program at work on toy inputs.

    :param command: program and flags, in which {toy} is the folder of the inputs and {out} what is to be made.
    :param seed: which of the inputs lies at {out} beforehand, for a program that adds to its input.
    :param name: {out}'s.
    """

    command: str
    seed: str = ""
    name: str = "out"

    def words(self, toy: Path, out: Path) -> list[str]:
        """:return: the command, after the interpreter."""
        return [word.format(toy=toy, out=out) for word in shlex.split(self.command)]

    def needs(self) -> set[str]:
        """:return: which of the inputs it reads."""
        return {*re.findall(r"{toy}/([\w.]+)", self.command), self.seed} - {""}

    def prepare(self, toy: Path, folder: Path) -> Path:
        """Have what must lie at {out} lie there; :return: {out}, in a folder that is empty."""
        if self.seed:
            shutil.copytree(toy / self.seed, folder / self.name, symlinks=True)
        return folder / self.name


TRAINING = Stage(
    f"image_train.py --data_dir {{toy}}/data --unlabelled_dir {{toy}}/unlabelled {MODEL} --lr 1e-3 --batch_size 2 "
    "--ema_rate 0.9 --drop_rate 0.3 --max_steps 4 --save_interval 1 --keep_checkpoints 2 --val_interval 2 "
    "--log_interval 1 --preview_samples 1 --use_checkpoint False --num_workers 0"
)
SAMPLING = (
    "image_sample.py --data_dir {toy}/data --results_path {out} --use_train True --batch_size 2 --timestep_respacing 4 "
    "--num_workers 0"
)
STAGES = {
    "toy": Stage("scripts/make_toy_monuseg.py {out} --train 4 --test 1 --size 128"),
    "prepare": Stage("scripts/prepare_monuseg.py {toy}/raw {out} --patch_size 64 --stride 64 --resize 16"),
    "import": Stage("scripts/import_dataset.py {toy}/foreign {out} --num_workers 1"),
    "features": Stage(
        "scripts/extract_features.py {toy}/data --results_path {out} --backbone stain --batch_size 2 --num_workers 0",
        name="out.npz",
    ),
    "clusters": Stage(
        "scripts/cluster_patches.py {out} --features {toy}/features.npz --n_clusters 2 --out_name clusters",
        seed="data",
    ),
    "structures": Stage(
        "scripts/make_structures.py {toy}/data --results_path {out} --count 6 --size 16 --num_workers 1"
    ),
    "segmenter": Stage(
        "scripts/train_segmenter.py {toy}/data --results_path {out} --max_steps 4 --batch_size 2 --crop 16 "
        "--val_interval 2 --pretrained False --device cpu --val_share 0.3"
    ),
    "segment": Stage("scripts/segment.py {toy}/segmenter {toy}/data/MoNuSegTestData/images --results_path {out}"),
    "training": TRAINING,
    "sampling": Stage(
        f"{SAMPLING} --match_struct True --s 1.5 --model_path {{toy}}/model/ema_0.9_000004.pt --num_samples 6"
    ),
    "sweep": Stage(f"{SAMPLING} --s 1,1.5 --model_path '{{toy}}/model/ema_0.9_*.pt' --num_samples 4"),
    "fields": Stage(f"{SAMPLING} --field True --model_path {{toy}}/model/ema_0.9_000004.pt --num_samples 3"),
    "filter": Stage(
        "scripts/filter_ood.py --data_dir {toy}/data --synthetic {toy}/samples --results_path {out} --mode top_n "
        "--top_n 4 --max_bank 200 --backbone sdm:{toy}/model/ema_0.9_000004.pt@5"
    ),
    "assembly": Stage(
        "scripts/assemble_set.py --data_dir {toy}/data --synthetic {toy}/samples --results_path {out} --ratio all"
    ),
    "export": Stage("scripts/export_set.py {toy}/data {out} --format coco --num_workers 1"),
    "evaluate": Stage(
        "scripts/evaluate.py --data_dir {toy}/data --synthetic {toy}/samples --results_path {out} --metrics "
        "copies,colour --device cpu"
    ),
    "masks": Stage(
        "scripts/evaluate.py --predicted {toy}/data/MoNuSegTestData/inst_masks "
        "--truth {toy}/data/MoNuSegTestData/inst_masks --results_path {out}"
    ),
    "publish": Stage("scripts/publish_model.py {toy}/model/ema_0.9_000004.pt {out}"),
    "subset": Stage("scripts/experiment/subset_slides.py {toy}/data {out} --subsample 0.5 --val_share 0"),
    "rival": Stage("scripts/experiment/rival_samples.py transfer {toy}/split --results_path {out} --count 3"),
    "summary": Stage("scripts/summarise_runs.py {out} a={toy}/model", name="out.csv"),
}
INPUTS = {
    "raw": STAGES["toy"],
    "data": STAGES["prepare"],
    "features.npz": STAGES["features"],
    "foreign": STAGES["export"],
    "segmenter": STAGES["segmenter"],
    "model": STAGES["training"],
    "samples": STAGES["sampling"],
    "split": STAGES["subset"],
}


def provide(stage: Stage, toy: Path, make: Callable[[Stage, Path], None]) -> None:
    """
    Make the inputs of a stage that are not there yet.

    :param make: runs a stage to its good end, which makes the path that it is given.
    """
    toy.mkdir(parents=True, exist_ok=True)
    for name in sorted(stage.needs()):
        if (toy / name).exists():
            continue
        if name != "unlabelled":
            provide(INPUTS[name], toy, make)
            make(INPUTS[name], toy / name)
            continue
        # Other images than those that training may not see.
        (toy / name).mkdir()
        for number, path in enumerate(sorted((toy / "data/MoNuSegTestData/images").iterdir())):
            ImageOps.mirror(Image.open(path)).save(toy / name / f"other_{number:03d}.png")
