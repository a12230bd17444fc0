"""Synthetic defects: a normal image, a mask and a prompt go in, an image and a mask come out.

=======================  =======================================================================
`PasteSynthesizer`       Real defects, moved, turned, scaled and blended in
`PerlinSynthesizer`      Regions of Perlin noise, as in MemSeg and DRAEM
`DiagSynthesizer`        Drawn from words by a diffusion model (DIAG)
`DreamBoothSynthesizer`  Drawn by a diffusion model fine-tuned on a few defects, by LoRA (In&Out)
`InAndOutSynthesizer`    A mixture of any two
=======================  =======================================================================
"""

from .base import Defect, Request, Synthesis, Synthesizer
from .inpainting import DiagSynthesizer
from .lora.dreambooth import DreamBoothSynthesizer
from .mixture import InAndOutSynthesizer
from .paste import PasteSynthesizer
from .perlin import PerlinSynthesizer

__all__ = [
    "Defect",
    "DiagSynthesizer",
    "DreamBoothSynthesizer",
    "InAndOutSynthesizer",
    "PasteSynthesizer",
    "PerlinSynthesizer",
    "Request",
    "Synthesis",
    "Synthesizer",
]
