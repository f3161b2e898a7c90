"""Measuring tokenizers and generators, and showing what they do."""

from ibq_fast.evaluate.images import image_grid, reconstruction_grid, save_png, usage_plot
from ibq_fast.evaluate.similarity import pixel_errors, psnr, ssim
from ibq_fast.evaluate.usage import CodebookUsage, usage_figures

__all__ = [
    "CodebookUsage",
    "image_grid",
    "pixel_errors",
    "psnr",
    "reconstruction_grid",
    "save_png",
    "ssim",
    "usage_figures",
    "usage_plot",
]
