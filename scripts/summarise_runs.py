"""Sum training runs up in a table: python scripts/summarise_runs.py OUT.csv NAME=FOLDER [NAME=FOLDER ...]"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion import cli
from guided_diffusion.files import read_json, writing

FIELDS = ("cluster", "images", "steps", "best_val_loss", "path")


def row(name: str, folder: str) -> dict[str, object]:
    """:return: FIELDS of one run, from the result.json that image_train.py leaves at its end."""
    path = Path(folder) / "result.json"
    try:
        result = read_json(path)
        values = (name, result["images"], result["step"], result["best"].get("val_loss", ""), result["checkpoint"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: that run has not come to its end; run it again") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not what image_train.py wrote: run it again") from None
    return dict(zip(FIELDS, values))


def parted(run: str) -> tuple[str, str]:
    """:return: NAME and FOLDER of NAME=FOLDER, either of which may hold another "="."""
    pairs = [(run[:place], run[place + 1 :]) for place, sign in enumerate(run) if sign == "="]
    if not pairs:
        raise ValueError(f"{run}: give NAME=FOLDER")
    return next((pair for pair in pairs if Path(pair[1]).is_dir()), pairs[0])


def main(argv: list[str] | None = None) -> None:
    """Write the table, whole or not at all."""
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("out", metavar="OUT.csv", type=Path, help="file to write")
    parser.add_argument("runs", metavar="NAME=FOLDER", nargs="*", help="a cluster and its training's folder")
    args = parser.parse_args(argv)
    rows = [row(*parted(run)) for run in args.runs]
    with writing(args.out, "w") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(main)
