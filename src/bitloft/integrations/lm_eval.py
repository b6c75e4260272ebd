"""EleutherAI's lm-evaluation-harness on our models, through one function (extra ``eval``).

The harness sees an ordinary transformers model: a packed base with its start, and an adapter that PEFT carries. What is
handed on is its own results dictionary, metric by metric with the harness's standard errors.
"""

from collections.abc import Sequence
from typing import Any

from bitloft.errors import DataError, OptionError


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 4,
    shots: int | None = None,
    include: str | None = None,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value (``acc``, ``acc_stderr``, ...) of ``tasks``, on the first ``limit`` rows of each.

    ``include`` is a folder with task files of one's own. Raises OptionError where lm-eval is not installed or does not
    know a task, DataError where a task's data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError("lm-eval is not installed; install bitloft[eval] to run its tasks.") from error
    manager = TaskManager(include_path=include)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise OptionError(f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm-eval --tasks list` names them.")
    held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    try:
        found = simple_evaluate(
            model=held, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager, bootstrap_iters=1000
        )
    except (ConnectionError, OSError) as error:
        raise DataError(f"lm-eval cannot load the data of {', '.join(tasks)} ({error}); check the network.") from error
    return {task: _numbers(figures) for task, figures in (found or {})["results"].items()}


def _numbers(figures: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; what is no number is left out."""
    kept = {key.partition(",")[0]: value for key, value in figures.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in kept.items()}
