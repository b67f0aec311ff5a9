"""The control plane: who owns which instance, which nodes live, and where a new one goes."""
