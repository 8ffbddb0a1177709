"""Compare base and tuned side by side."""

from kfp.dsl import HTML, Artifact, Input, Metrics, Model, Output

from components import component


@component
def evaluate(
    plan: dict,
    work_dir: str,
    model: Input[Model],
    evaluation: Output[Artifact],
    report: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Draw from base and tuned alike and score both: FID, KID, IS, precision, recall, each also at its best settings.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted; empty without one.
        model: What the step tune made.
        evaluation: All numbers, sheets and the report. Of an experiment on a volume instead: that it or its model failed.
        report: The run on one page, base against tuned, as vapi report makes it.
        metrics: The numbers of base and tuned, and of each at its best.
    """
    from vapi.cluster import pages, step

    made = step.attempt("evaluate", plan, work_dir, evaluation.path, tune=model.path)
    evaluation.metadata.update(plan.get("tags", {}))  # by which an experiment's last step knows whose it is
    if made is None:
        return
    step.write(pages.evaluation(made, model.path), report.path)
    for name, value in pages.evaluation_metrics(made).items():
        metrics.log_metric(name, value)
