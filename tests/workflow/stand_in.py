"""
Stands in for the programs of the pipeline where a test is about how they are wired: same arguments, same places of
files, no content but checksums of what went in. Given as PYTHON, so called as `stand_in PROGRAM arguments`.

It adds a line to $RECORD for each call. A training takes $STEP_SECONDS a step, adds a line to `steps` in its folder for
each, saves at SIGTERM and ends well, as image_train.py does, and goes on from what it saved. $FAIL names a program that
fails, and perhaps words of the calls that do.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    if sys.argv[1] == "-c":
        sys.exit(1)  # it has no Snakemake
    program, arguments = Path(sys.argv[1]).stem, sys.argv[2:]
    if arguments[:1] == ["--dry_run"]:
        return
    with open(os.environ["RECORD"], "a") as record:
        record.write(f"{program} {' '.join(arguments)}\n")
    failing, _, words = os.environ.get("FAIL", "").partition(" ")
    if program == failing and words in f"{arguments} {os.environ.get('OPENAI_LOGDIR')}":
        sys.exit("it was told to fail")
    globals()[program](*[word for word in arguments if not word.startswith("--")], flags=flags_of(arguments))


def flags_of(arguments: list[str]) -> dict[str, list[str]]:
    """Flag -> the words after it, up to the next flag."""
    found, name = {}, ""
    for word in arguments:
        if word.startswith("--"):
            name = word[2:]
            found[name] = []
        elif name:
            found[name].append(word)
    return found


def digest(*things: object) -> str:
    """A checksum of texts, of files, and of folders' files."""
    total = hashlib.sha256()
    for thing in things:
        paths = []
        if isinstance(thing, Path):
            paths = sorted(thing.rglob("*")) if thing.is_dir() else [thing]
        total.update(str(thing.name if isinstance(thing, Path) else thing).encode())
        for path in paths:
            if path.is_file():
                total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text)
    aside.replace(path)


def prepare_monuseg(raw, out, *rest, flags):
    for slide in sorted(Path(raw).rglob("*.tif")):
        split = "MoNuSegTestData" if "Test" in str(slide.relative_to(raw)) else "MoNuSegTrainingData"
        for number in range(2):
            write(Path(out, split, "images", f"{slide.stem}_{number:03d}.png"), digest(slide, number))
    write(Path(out, "prepare.json"), "{}")


def extract_features(*folders, flags):
    write(Path(flags["results_path"][0]), digest(flags["backbone"], *map(Path, flags["root"])))


def cluster_patches(data, *rest, flags):
    for number, image in enumerate(sorted(Path(data, "MoNuSegTrainingData/images").iterdir())):
        link = Path(data, flags["out_name"][0], str(int(number % 3 == 0)), "MoNuSegTrainingData/images", image.name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(image, link.parent))


def image_train(*rest, flags):
    folder, goal = Path(os.environ["OPENAI_LOGDIR"]), int(flags["max_steps"][-1])
    folder.mkdir(parents=True, exist_ok=True)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    state = folder / "state"
    step = int(state.read_text()) if state.exists() else 0
    kind = digest(flags["lr"], flags.get("init_checkpoint"), Path(flags["data_dir"][0], "MoNuSegTrainingData"))
    while step < goal and not stop:
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        step += 1
        with open(folder / "steps", "a") as steps:
            steps.write(f"{step}\n")
        if step % int(flags["save_interval"][-1]) == 0 or step == goal or stop:
            write(folder / f"ema_{flags['ema_rate'][-1]}_{step:06d}.pt", f"{kind} {step}")
            write(state, str(step))


def image_sample(*rest, flags):
    out = Path(flags["results_path"][0])
    models, scales = (list(dict.fromkeys(flags[name][0].split(","))) for name in ("model_path", "s"))
    several = len(models) * len(scales) > 1
    for model in models:
        for s in scales:
            for number in range(int(flags["num_samples"][0])):
                name = (out / f"{Path(model).stem}_s{s}" if several else out) / "samples" / f"{number}.png"
                if not name.exists():
                    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
                    write(
                        name,
                        digest(Path(model), s, number, flags["num_steps"], *map(Path, flags.get("structure_dir", []))),
                    )
    write(out / ("sweep.png" if several else "grid.png"), "")


def make_structures(*rest, flags):
    write(Path(flags["out"][0], "structures.json"), digest(flags["count"], flags["size"]))


def make_toy_monuseg(raw, flags):
    Path(raw).mkdir()


def summarise_runs(*rest, flags):
    pass


def filter_ood(*rest, flags):
    out = Path(flags["results_path"][0])
    for folder in flags["synthetic"]:
        for sample in sorted(Path(folder).rglob("samples/*.png")):
            write(
                out / "kept/samples" / f"{folder.replace('/', '-')}-{sample.parents[1].name}-{sample.name}",
                digest(sample),
            )
    write(out / "report.json", json.dumps(flags["data_dir"]))


def assemble_set(*rest, flags):
    made = digest(flags["ratio"], *map(Path, flags["data_dir"] + flags["synthetic"]))
    write(Path(flags["results_path"][0], "manifest.csv"), made)


if __name__ == "__main__":
    main()
