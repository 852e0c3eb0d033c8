"""What synthetic patches and segmenters are worth: results folders, metrics of images and masks, reports."""
