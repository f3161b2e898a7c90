"""Measuring tokenizers and generators, and showing what they do."""

from ibq_fast.evaluate.images import image_grid, psnr, reconstruction_grid, save_png, usage_plot
from ibq_fast.evaluate.usage import CodebookUsage, usage_figures

__all__ = [
    "CodebookUsage",
    "image_grid",
    "psnr",
    "reconstruction_grid",
    "save_png",
    "usage_figures",
    "usage_plot",
]
