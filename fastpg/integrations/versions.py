"""Which versions of a framework an adapter was tested with."""

from __future__ import annotations

import warnings
from importlib import metadata


def check_version(distribution: str, oldest: str, newest: str) -> None:
    """Says so where the installed version is not one that was tested.

    Args:
        distribution: the name by which pip installs the framework, such as "verl".
        oldest, newest: the versions that the adapter's tests were run with, the first and the last.

    Raises ImportError if it is not installed. Warns (UserWarning) if it is older or newer.
    """
    tested = f"{distribution} {oldest}" if oldest == newest else f"{distribution} {oldest} to {newest}"
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed; this adapter was tested with {tested}") from None
    from packaging.version import Version  # which every framework here depends on, and fastpg alone does not

    if not Version(oldest) <= Version(Version(found).public) <= Version(newest):
        said = f"{distribution} {found} is installed; this adapter was tested with {tested}: compare a loss before you train"
        warnings.warn(said, stacklevel=3)
