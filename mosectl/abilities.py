"""The documented place of :func:`load_tasks` before the package had storeys; `mosectl.load_tasks` is today's."""

from mosectl.measure.lm_harness import AbilityTasks, load_tasks

__all__ = ["AbilityTasks", "load_tasks"]
