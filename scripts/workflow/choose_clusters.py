"""
Write down which clusters to fine-tune on: python scripts/workflow/choose_clusters.py CLUSTERS OUT [LABEL ...]

CLUSTERS is a folder that cluster_patches.py made, OUT a file of JSON. Without LABEL it is the cluster with the most
training patches; noise, -1, is none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from guided_diffusion import cli, files
from guided_diffusion.histology.slides.annotations import TRAIN_SPLIT


def main(argv: list[str] | None = None) -> None:
    parser = cli.FlagParser(description=__doc__)
    parser.add_argument("clusters", metavar="CLUSTERS", type=Path, help="folder that cluster_patches.py made")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("labels", metavar="LABEL", nargs="*", help="clusters, each a folder of CLUSTERS")
    args = parser.parse_args(argv)
    for label in args.labels:
        if not (args.clusters / label / TRAIN_SPLIT).is_dir():
            raise ValueError(f"CLUSTERS: {args.clusters} has no training patches of {label}: choose another label")
    files.write_json(args.out, args.labels or [largest(args.clusters)])


def largest(clusters: Path) -> str:
    """:return: the label of the cluster with the most training patches, the first of several by name."""
    sizes = {
        folder.parents[1].name: sum(1 for _ in folder.iterdir())
        for folder in sorted(clusters.glob(f"*/{TRAIN_SPLIT}/images"))
        if folder.parents[1].name != "-1"
    }
    if not sizes:
        raise ValueError(f"{clusters} has no cluster but noise: choose other settings")
    return max(sizes, key=sizes.__getitem__)


if __name__ == "__main__":
    cli.run(main)
