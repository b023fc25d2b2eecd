"""Selective state spaces for images: the scan, SS2D, spectral gating, and the networks made of them."""
