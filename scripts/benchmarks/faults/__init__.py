"""
What soak.py does to the programs. `toy` makes small inputs and knows each stage's command; `trials` runs commands and
tells whether one ended as it must; the other modules each do one kind of harm. Nothing here knows how a stage works
inside: it is judged by its exit code, its lines and its files.
"""
