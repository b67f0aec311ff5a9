"""What leaves a jail: docs/decisions/0010-egress.md."""
