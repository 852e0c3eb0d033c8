"""DESIGN's table of ranks, held as data: a module imports only modules of a lower rank."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "guided_diffusion"

RANKS = {
    # Shared by the core and histology:
    "files": -3,
    "figures": -2,
    "cards": -3,
    "progress": -3,
    "image_decoding": -3,
    "image_files": -2,
    "slides": -2,
    "images": 0,
    "unlabelled": 1,
    "devices": -2,
    "magnification": -1,
    "cell_classes": -1,
    "stains": -1,
    "signals": -2,
    "streams": -2,
    "draws": 1,
    # What dist_util stands on:
    "environment": -2,
    "mpi": -1,
    "network": -1,
    "log_sinks": -1,
    "cli": -1,
    "processes": 0,
    "failures": 1,
    "logger": 0,
    "casting": -1,
    "nn": 0,
    "losses": 0,
    "resample": 0,
    "dist_util": 0,
    "hv_maps": 0,
    "structures": 0,
    "data_util": 0,
    "guidance": 0,
    "background": 0,
    "schedules": 0,
    "options": 0,
    "conditioning": 1,
    "ema": 1,
    "pictures": 1,
    "dealing": 2,
    "meters": 1,
    "fp16_util": 1,
    "spade": 1,
    "image_transforms": 1,
    "data_stream": 1,
    "samplers": 1,
    "windows": 2,
    "diffusion_process": 2,
    "checkpoint": 1,
    "trained_flags": 1,
    "pairing": 1,
    "reading": 2,
    "image_datasets": 3,
    "results": 2,
    "results_path": 4,
    "unet_blocks": 2,
    "model_options": 2,
    "run_options": 2,
    "sample_options": 3,
    "train_options": 3,
    "checkpoint_sets": 2,
    "checkpointer": 3,
    "microbatch": 4,
    "unet": 3,
    "gaussian_diffusion": 3,
    "respace": 4,
    "script_util": 5,
    "sampling_plan": 5,
    "condition_cache": 6,
    "sweep": 7,
    "validation": 6,
    "train_util": 7,
    "bridge": 7,
    "histology.slides.aperio": 0,
    "histology.slides.annotations": 1,
    "histology.slides.patches": 0,
    "histology.slides.scales": 2,
    "histology.slides.toy": 0,
    "histology.formats.fields": 0,
    "histology.formats.raw_layout": 1,
    "histology.formats.readers.opening": 2,
    "histology.formats.readers.arrays": 3,
    "histology.formats.readers.matlab": 4,
    "histology.formats.readers.folders": 3,
    "histology.formats.readers.coco": 3,
    "histology.formats.data_sets": 5,
    "histology.evaluation.image_metrics": 0,
    "histology.evaluation.instance_metrics": 0,
    "histology.evaluation.class_metrics": 1,
    "histology.evaluation.mask_folders": 2,
    "histology.evaluation.runs": 0,
    "histology.evaluation.evaluator": 1,
    "histology.evaluation.report": 1,
    "histology.experiment.gains": 0,
    "histology.experiment.protocol": 0,
    "histology.features.lite0": 0,
    "histology.features.backbones": 1,
    "histology.features.clustering": 0,
    "histology.features.embeddings": 2,
    "histology.features.cluster_folders": 3,
    "histology.features.cluster_picture": 1,
    "histology.filtering.patchcore": 0,
    "histology.filtering.comparison": 1,
    "histology.filtering.picture": 0,
    "histology.segmenter.net": 1,
    "histology.segmenter.decoding": 2,
    "histology.segmenter.agreement": 3,
    "histology.segmenter.pseudo": 0,
    "histology.segmenter.data": 3,
    "histology.segmenter.training": 4,
    "histology.structures.bank": 0,
    "histology.structures.layouts": 1,
    "histology.structures.statistics": 1,
    "histology.structures.picture": 2,
    "histology.formats.writers.labelled": 0,
    "histology.formats.writers.writer": 1,
    "histology.formats.writers.cellpose": 2,
    "histology.formats.writers.cellvit": 2,
    "histology.formats.writers.coco": 2,
    "histology.formats.writers.hovernet": 2,
    "histology.formats.writers.imagefolder": 2,
    "histology.formats.writers.qupath": 2,
    "histology.formats.writers.stardist": 2,
    "histology.formats.writers.webdataset": 2,
    "histology.formats.writers.layouts": 3,
    "histology.assembly": 4,
}

# Room of histology -> the other rooms that it may import. All may import what both sides share. The core, "", is a room
# to the bridge alone, which nothing imports but programs.
ROOMS = {
    "slides": set(),
    "evaluation": set(),
    "experiment": set(),
    "features": {"slides"},
    "formats": {"slides"},
    "filtering": set(),
    "structures": set(),
    "segmenter": {"evaluation", "features", "slides"},
    "assembly": {"evaluation", "features", "slides"},
    "bridge": {"", "features"},
}
SHARED = {
    "figures",
    "files",
    "image_files",
    "slides",
    "images",
    "progress",
    "stains",
    "devices",
    "magnification",
    "cell_classes",
    "signals",
    "streams",
}


def module_files() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def imports(path: Path, name: str) -> set[str]:
    """The project's modules that a file imports, by their names in RANKS."""
    package = ["guided_diffusion", *name.split(".")[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            targets = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {target.removeprefix("guided_diffusion.") for target in targets}
    return found & set(RANKS)


def room(name: str) -> str:
    """The room of histology that a module is in; "" for the core."""
    return name.split(".")[1] if name.startswith("histology.") else "bridge" if name == "bridge" else ""


def test_every_module_has_a_rank():
    assert set(module_files()) == set(RANKS)


@pytest.mark.parametrize("name", sorted(RANKS))
def test_imports_go_down(name):
    for imported in imports(module_files()[name], name):
        assert RANKS[imported] < RANKS[name], f"{name} imports {imported}"
        assert room(imported) in {room(name), *ROOMS.get(room(name), ())} or imported in SHARED, (
            f"{name} imports {imported}"
        )


def test_every_room_says_what_it_owns():
    assert {room(name) for name in RANKS} == {"", *ROOMS}
    for name in ROOMS.keys() - {"assembly", "bridge"}:
        assert ast.get_docstring(ast.parse((PACKAGE / "histology" / name / "__init__.py").read_text()))


def test_the_check_sees_imports():
    assert imports(PACKAGE / "unet.py", "unet") == {"casting", "nn", "fp16_util", "spade", "unet_blocks"}
    assert "logger" in imports(PACKAGE / "train_util.py", "train_util")


def test_library_code_does_not_print():
    for name, path in module_files().items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printed, f"{name} prints"


def test_draws_have_a_purpose():
    """[s, n] and [s, n, 0] are one seed to NumPy; these draw one fixed thing, or from what their caller gives."""
    others = {"bridge", "resample", "histology.slides.toy", "histology.structures.picture"}
    drawing = {name for name, path in module_files().items() if "default_rng(" in path.read_text()}
    assert drawing == {"streams", *others}


def test_no_program_imports_another():
    for path in (ROOT / "scripts").rglob("*.py"):
        modules = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [module for module in modules if module.split(".")[0] in ("scripts", "image_train", "image_sample")]


@pytest.mark.parametrize("script", ["image_train.py", "image_sample.py"])
def test_entry_scripts_stay_short(script):
    assert len((ROOT / script).read_text().splitlines()) < 200
