"""What crosses ranks. `global_count` is for data parallelism; the rest serves `LMHead(group=...)` and DTensor weights."""

from .data_parallel import global_count

__all__ = ["global_count"]
