"""Measuring tools for developers. No loss depends on them."""
