"""Jails: the root process that makes them (the jailer), what runs inside, and the daemon's view of them."""
