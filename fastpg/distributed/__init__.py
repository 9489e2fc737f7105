"""Communication between ranks: `global_count` for data parallelism, the rest for `LMHead(group=...)` and DTensor weights."""

from .data_parallel import global_count

__all__ = ["global_count"]
