"""
Foreign data sets in, foreign segmenters' layouts out. What the classes of cells are is cell_classes's to say, which
all rooms share.
"""
