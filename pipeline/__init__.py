"""From prompt to latents, chunk by chunk."""
