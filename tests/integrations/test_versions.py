"""What is said where a framework is absent, older or newer than what an adapter was tested with."""

import runpy
import sys
import warnings
from importlib import metadata

import pytest

from fastpg.integrations import versions
from fastpg.integrations.versions import check_version


def installed(monkeypatch, version):
    monkeypatch.setattr(metadata, "version", lambda name: {"verl": version}[name])


@pytest.mark.parametrize("version", ["0.8.0", "0.8.5", "0.9.1", "0.9.1+cu128"])
def test_a_tested_version_is_silent(monkeypatch, version):
    installed(monkeypatch, version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version("verl", "0.8.0", "0.9.1")


@pytest.mark.parametrize("version", ["0.7.9", "0.10.0", "0.9.2"])
def test_an_older_and_a_newer_version_warn(monkeypatch, version):
    installed(monkeypatch, version)
    with pytest.warns(UserWarning, match=f"verl {version} is installed; .* tested with verl 0.8.0 to 0.9.1: compare a loss"):
        check_version("verl", "0.8.0", "0.9.1")


def test_one_tested_version_is_named_once(monkeypatch):
    installed(monkeypatch, "1.0")
    with pytest.warns(UserWarning, match=r"tested with verl 0.9.1: compare"):
        check_version("verl", "0.9.1", "0.9.1")


def test_an_absent_framework_is_an_import_error():
    with pytest.raises(
        ImportError, match="no-such-framework is not installed; this adapter was tested with no-such-framework 1 to 2"
    ):
        check_version("no-such-framework", "1", "2")


def test_adapters_need_no_package_that_fastpg_does_not_install(monkeypatch):
    """`packaging` comes with every framework, but `fastpg.integrations.verl.linear_cross_entropy` also runs without verl."""
    monkeypatch.setitem(sys.modules, "packaging.version", None)
    names = runpy.run_path(versions.__file__)
    with pytest.raises(ImportError, match="no-such-framework is not installed"):
        names["check_version"]("no-such-framework", "1", "2")
