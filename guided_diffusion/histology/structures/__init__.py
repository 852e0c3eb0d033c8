"""Layouts of nuclei made new: a bank of real ones, how these are put together, and how real the results look."""
