"""Which layouts there are, by the names that users give them."""

from .cellpose import Cellpose
from .cellvit import CellViT
from .coco import Coco
from .hovernet import HoVerNet
from .imagefolder import ImageFolder
from .qupath import QuPath
from .stardist import StarDist
from .webdataset import WebDataset
from .writer import Writer

LAYOUTS: dict[str, type[Writer]] = {
    "hovernet": HoVerNet,
    "cellvit": CellViT,
    "cellpose": Cellpose,
    "stardist": StarDist,
    "coco": Coco,
    "qupath": QuPath,
    "webdataset": WebDataset,
    "imagefolder": ImageFolder,
}
