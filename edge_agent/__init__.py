"""The node: runs instances in jails, carries their turns, and keeps their state durable."""
