"""Stage two: the class-conditional transformer over tokens, and sampling from it."""

from ibq_fast.generator.config import GeneratorConfig
from ibq_fast.generator.generator import Generator
from ibq_fast.generator.guidance import Guidance
from ibq_fast.generator.sampler import Partial
from ibq_fast.generator.serving import Server, Ticket
from ibq_fast.generator.settings import PRESETS, SamplingSettings
from ibq_fast.ops.filtering import filter_logits

__all__ = [
    "PRESETS",
    "Generator",
    "GeneratorConfig",
    "Guidance",
    "Partial",
    "SamplingSettings",
    "Server",
    "Ticket",
    "filter_logits",
]
