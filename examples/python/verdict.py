"""Judge image files with an exported model: python verdict.py MODEL.xml IMAGE [IMAGE ...].

It takes `pip install openvino pillow` and nothing else, no torch and no Anomalib.
"""

import sys

import numpy as np
import openvino
from PIL import Image


def main(model_file: str, *image_files: str) -> None:
    """Print verdict and probability of every image, by the thresholds in the model's own metadata."""
    core = openvino.Core()
    model = core.read_model(model_file)

    def number(name: str) -> float:
        return float(model.get_rt_info(["framework", name]).value)

    accept_below, reject_from = number("accept_below"), number("reject_from")
    at_0, at_1 = number("probability_at_0"), number("probability_at_1")
    # Without the hint OpenVINO computes in bfloat16 where a processor can, which costs accuracy.
    network = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for name in image_files:
        with Image.open(name) as image:
            pixels_HWC = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        score = network(pixels_HWC.transpose(2, 0, 1)[None])["pred_score"].item()
        verdict = "accept" if score < accept_below else "reject" if score >= reject_from else "review"
        print(f"{name}: {verdict}, probability {at_0 + (at_1 - at_0) * score:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
