"""Compares fastpg with the float64 oracle: `assert_matches_oracle` on your tensors, and the command `fastpg check`."""

from .judge import assert_matches_oracle

__all__ = ["assert_matches_oracle"]
