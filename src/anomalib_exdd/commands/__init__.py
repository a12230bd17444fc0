"""Subcommands of `anomalib` beside those that live with their feature."""
