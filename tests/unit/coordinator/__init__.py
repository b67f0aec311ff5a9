"""Unit tests of the coordinator: no sleep, no network."""
