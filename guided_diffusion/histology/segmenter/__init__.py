"""The downstream segmenter: its network, what it learns from, its training, and from its maps to instances."""
