"""What nobody needs any more leaves the blob store. Start with `rounds.py`, which says why that is safe."""
