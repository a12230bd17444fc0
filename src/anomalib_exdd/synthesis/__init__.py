"""Synthetic defects: a normal image, a mask and a prompt go in, an image and a mask come out."""

from .synthesizer import Defect, Request, Synthesis, Synthesizer

__all__ = ["Defect", "Request", "Synthesis", "Synthesizer"]
