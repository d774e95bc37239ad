"""Errors, files, types and optional packages."""
