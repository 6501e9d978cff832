"""An evaluation as an experiment on its rows' Langfuse dataset."""

import argparse
from collections.abc import Callable
from typing import Any

from slm_swap.common.errors import UserError
from slm_swap.common.settings import Settings
from slm_swap.rows.examples import Dataset
from slm_swap.tracing.api import LangfuseApi
from slm_swap.tracing.datasets import Experiment, dataset_name, open_experiment


def find_experiment(
    args: argparse.Namespace, settings: Settings, dataset: Dataset, inputs: dict, name: str, told: dict[str, Any]
) -> Experiment:
    """The experiment of `--langfuse-experiment` on the dataset that was pushed from these rows."""
    source = f"--dataset {inputs['path']}" if args.dataset or args.replies else f"--split {args.split or 'test'}"
    push = f"python 02_dataset/push_langfuse.py --track {args.track} {source}"
    return open_experiment(settings, args.track, dataset_name(args.track, name), list(dataset), args.langfuse_experiment, push, told)


def link(experiment: Experiment, settings: Settings, dataset: Dataset, trace: Any, warn: Callable[[str], None]) -> None:
    """Tell an older server which rows are whose items; newer ones go by the spans. The report is written: what fails is said."""
    try:
        with LangfuseApi(settings) as api:
            linked = experiment.link(api, ((example, trace.id, trace.row_id(example.id)) for example in dataset))
        print(f"experiment: {experiment.url}")
        if linked:
            warn(
                f"this server adds up the cost of a row's whole trace, and all {linked} rows share one: the experiment's cost is shown "
                f"{linked} times too high there; the report and the trace have the right one"
            )
    except UserError as error:
        warn(f"the experiment {experiment.name} may lack rows: {error}")
