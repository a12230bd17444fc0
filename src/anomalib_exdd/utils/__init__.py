"""Helpers that all other packages may use."""
