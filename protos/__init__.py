"""The contracts between everything that speaks over a wire."""
