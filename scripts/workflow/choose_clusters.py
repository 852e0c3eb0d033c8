"""
Write down which clusters to fine-tune on: python scripts/workflow/choose_clusters.py CLUSTERS OUT [LABEL ...]

CLUSTERS is a folder that cluster_patches.py made, OUT a file of JSON. Without LABEL it is the cluster with the most
training patches; noise, -1, is none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from guided_diffusion import cli, files
from guided_diffusion.histology.features.cluster_folders import largest_cluster
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
    files.write_json(args.out, args.labels or [largest_cluster(args.clusters)])


if __name__ == "__main__":
    cli.run(main)
