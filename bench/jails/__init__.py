"""The parts of `bench/jail.py`."""
