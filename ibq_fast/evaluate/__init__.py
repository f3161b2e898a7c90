"""Measuring tokenizers and generators, and showing what they do."""

from ibq_fast.evaluate.images import image_grid, psnr, reconstruction_grid, save_png, usage_plot

__all__ = ["image_grid", "psnr", "reconstruction_grid", "save_png", "usage_plot"]
