"""A latent diffusion model over the stored latents of any codec."""
