"""Which synthetic patches look real: PatchCore scores, the rules of keeping by them, and their picture."""
