"""Who is who in a joint sequence, and where in a run a call stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """placeholder"""

@dataclass(frozen=True)
class Site:
    """placeholder"""
