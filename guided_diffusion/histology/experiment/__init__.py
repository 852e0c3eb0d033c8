"""Whether synthetic patches help: what is trained on what, and which gains are more than chance."""
