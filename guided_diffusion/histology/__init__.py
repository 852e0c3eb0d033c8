"""All that is not diffusion: annotations, patches and what is measured on them. Imports nothing of the core."""
