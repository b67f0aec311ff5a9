"""What hostile code tries in a jail. `python -m probe` from the directory above runs it; see `__main__`."""
