"""Where the mesh's records are kept."""
