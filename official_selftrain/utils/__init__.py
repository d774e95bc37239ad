"""Errors, files and optional packages."""
