"""What several models share: weights, settings, metrics, pictures. A model's own parts stay in its folder."""
