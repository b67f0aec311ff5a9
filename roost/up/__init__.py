"""A whole mesh on this machine, each part a process of its own: `roost up`."""
