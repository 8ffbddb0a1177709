"""Make the table of an experiment from its evaluations."""

from kfp.dsl import Artifact, Input, Markdown, Output

from components import component


@component
def collect(
    work_dir: str,
    table: Input[Artifact],
    evaluations: Input[list[Artifact]],
    results: Output[Artifact],
    page: Output[Markdown],
) -> list:
    """Put the numbers of all rows beside the paper's, as vapi experiment does, and log the rows as nested runs of MLflow.

    Args:
        work_dir: Folder in which the volume is mounted; empty without one.
        table: What the step expand wrote: the experiment, and which run each row's numbers come from.
        evaluations: What the steps evaluate made.
        results: table.md, table.csv and results.json.
        page: The table to read.

    Returns:
        Runs that failed; their rows say so.
    """
    from vapi.cluster.experiment import POINT, collect

    found = {evaluation.metadata[POINT]: evaluation.path for evaluation in evaluations}
    return collect(table.path, work_dir, found, results.path, page.path)
