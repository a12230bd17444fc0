"""Callbacks that both models share, and what they do to a model when its trainer restores a checkpoint."""
