"""Pre-training of what a small GLUS starts from, on generated scenes.

A full-size GLUS starts from parts that have seen the world: CLIP, SAM2, and an LLM from LISA that already finds what
people talk about. A small one has none to download, so it pre-trains its own, by dense supervision that generated
scenes give for free. CLIP and SAM2 then stay frozen, as the big ones do.
"""
