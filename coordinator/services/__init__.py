"""The coordinator's gRPC faces: they check what came, call, and translate. Nothing is decided here."""
