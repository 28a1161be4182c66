"""A latent store into a trained Diffusion Transformer."""
