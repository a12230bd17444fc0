"""Fine-tuning an inpainting model by LoRA (DreamBooth), and drawing defects with it."""
