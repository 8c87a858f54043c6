"""From arguments to what backends read: ``resolve`` (what the user meant), ``lower`` (tables), ``build`` (plans)."""

from .build import Plan, cached_plan, plan
from .lowered import Lowered
from .resolved import Resolved

__all__ = ["Lowered", "Plan", "Resolved", "cached_plan", "plan"]
