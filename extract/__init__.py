"""Raw images through a frozen VAE into a latent store, once."""
