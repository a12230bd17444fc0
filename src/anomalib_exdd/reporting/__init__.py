"""Figures and pages made from results; knows no model and no data module."""
