"""How segmenters and loaders want a labelled set: a module for each layout, all by writer's pattern."""
