"""Foreign data sets, a module for each way to keep them: arrays, MATLAB's files, masks beside images, COCO."""
