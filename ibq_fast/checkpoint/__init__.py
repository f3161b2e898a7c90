"""Models on disk: own directories, hub repositories, checkpoints of the published implementation."""

from ibq_fast.checkpoint.pretrained import PretrainedMixin

__all__ = ["PretrainedMixin"]
