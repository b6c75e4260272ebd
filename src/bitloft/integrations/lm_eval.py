"""EleutherAI's lm-evaluation-harness on our models, through one function (extra ``eval``).

The harness sees an ordinary transformers model: a packed base with its start, and an adapter that PEFT carries. What is
handed on is its own results dictionary, metric by metric with the harness's standard errors.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitloft.errors import CheckpointError, DataError, OptionError


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 4,
    shots: int | None = None,
    include: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value (``acc``, ``acc_stderr``, ...) of ``tasks``, on the first ``limit`` rows of each.

    A metric behind a filter of the task keeps its name, as in ``exact_match,strict-match``. ``include`` is a folder
    with task files of one's own; ``shots`` are examples in a prompt, by default the task's own number; bfloat16 as
    ``dtype`` runs under autocast. lm-eval sets the seeds of random, numpy and torch.
    Raises OptionError where lm-eval is not installed or does not know a task, DataError where a task's file or data
    cannot be read or its metrics are none, CheckpointError for a model that does not continue text.
    """
    try:
        from jinja2 import TemplateError
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise OptionError("lm-eval is not installed; install bitloft[eval] to run its tasks.") from error
    if include is not None and not Path(include).is_dir():
        raise OptionError(f"{include} is not a folder; give one with lm-eval's task files.")
    if not model.can_generate():
        raise CheckpointError(
            f"a {type(model).__name__} does not continue text, which lm-eval's tasks ask for; see `eval --task`."
        )
    if tokenizer is None:
        raise CheckpointError("the model holds no tokenizer; lm-eval's tasks are texts.")
    manager = TaskManager(include_path=None if include is None else str(include))
    ready = _loaded(manager, list(dict.fromkeys(tasks)))
    mixed = None if dtype == torch.float32 else dtype
    held = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, mixed_precision_dtype=mixed)
    try:
        found = simple_evaluate(
            model=held, tasks=ready, limit=limit, num_fewshot=shots, task_manager=manager, bootstrap_iters=1000
        )
    except TemplateError as error:
        raise DataError(f"a template of {', '.join(tasks)} does not fit the rows ({error}); mend the task.") from error
    return _figures(found or {"results": {}})


def _loaded(manager: Any, names: Sequence[str]) -> list[Any]:
    """lm-eval's tasks and groups of these names, their data read."""
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise OptionError(f"lm-eval has no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` names them.")
    ready: list[Any] = []
    try:
        for name in names:
            found = manager.load([name])
            ready += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
        every = manager.load(ready)["tasks"]  # refuses a task that is in two groups
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"lm-eval cannot load the data of {', '.join(names)} ({error}); check the task's path, or the network."
        ) from error
    except Exception as error:  # whatever a task file or a data set of others raises
        raise DataError(
            f"lm-eval cannot load {', '.join(names)} ({type(error).__name__}: {error}); mend the task's file."
        ) from error
    unsafe = [name for name, task in every.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise OptionError(
            f"{', '.join(unsafe)} runs programs that the model wrote, lm-eval in this very process; "
            "`eval --task humaneval` and `--task mbpp` run them apart."
        )
    return ready


def _figures(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Results by task. Raises DataError for a task without a single metric: lm-eval passes over names that it does not
    know."""
    made = {task: _numbers(figures) for task, figures in found["results"].items()}
    groups = found.get("group_subtasks") or {}
    for task, figures in made.items():
        if not groups.get(task) and not figures.keys() - {"sample_len"}:
            raise DataError(f"lm-eval measured nothing of {task}; its metric_list names no metric that lm-eval has.")
    return made


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; a filter's name stays (one metric may have several); what is no number is left out."""
    kept = {key.removesuffix(",none"): value for key, value in figures.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in kept.items()}
