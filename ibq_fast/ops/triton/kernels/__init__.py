"""Device code: one kernel a file, Triton's language only. What surrounds it is in the package above."""
