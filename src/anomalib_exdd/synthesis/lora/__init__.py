"""LoRA: an inpainting model is fine-tuned on a surface and its defects, and draws with what it has learned."""
