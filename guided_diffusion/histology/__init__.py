"""
All that is not diffusion, in rooms by trade: slides, features, filtering, segmenter, evaluation, and assembly on top.

Imports nothing of the core but `files`. Which room may import which stands in tests/test_architecture.py.
"""
