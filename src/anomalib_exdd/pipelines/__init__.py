"""Subcommands that fit Anomalib's command line."""
