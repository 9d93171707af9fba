"""Replies before and after training beside the expected one, as console and report show them."""

from __future__ import annotations

from collections.abc import Mapping

SAMPLE_FIELDS = ("prompt", "before", "after", "expected")
"""The keys of a sample, in the order of their columns; a sample may lack some."""


def is_as_expected(sample: Mapping[str, str], field: str) -> bool:
    """Whether a reply equals the expected one, ignoring white space around it."""
    return field in sample and sample[field].strip() == sample.get("expected", "").strip() != ""
