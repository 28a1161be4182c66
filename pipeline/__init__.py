"""What the stages share: the network, the diffusion process, the latent store, the VAE and checkpoints."""
