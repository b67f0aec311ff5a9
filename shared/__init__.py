"""What both daemons need, and nothing that only one of them does."""
