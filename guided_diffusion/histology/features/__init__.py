"""What patches look like as vectors: backbones, feature files, clusters of patches and their folders."""
