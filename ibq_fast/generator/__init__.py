"""Stage two: the class-conditional transformer over tokens, and sampling from it."""

from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.ops.filtering import filter_logits
from ibq_fast.generator.generator import Generator

__all__ = ["Generator", "GeneratorConfig", "filter_logits"]
