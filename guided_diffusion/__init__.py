"""Semantic diffusion model for labelled H&E patches: the core, reference module names kept flat."""
