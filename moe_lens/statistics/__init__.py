"""Streaming statistics over records: each keeps sums only and yields a table."""

from moe_lens.statistics.base import Statistic
from moe_lens.statistics.usage import ExpertUsage

__all__ = ["ExpertUsage", "Statistic"]
