"""Helpers that know nothing of images, data or models."""
