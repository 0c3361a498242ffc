"""The mixture-of-experts layer: router, latent projections, experts."""
