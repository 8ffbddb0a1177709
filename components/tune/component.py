"""Fine-tune the generator with VA-pi, in one pod."""

from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from components import component


@component
def tune(
    plan: dict,
    work_dir: str,
    subset: Input[Dataset],
    tokens: Input[Dataset],
    model: Output[Model],
    curves: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Fine-tune the generator, one process for each GPU of the pod; with a volume, a retry continues from the last checkpoint.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted; empty without one.
        subset: What the step subset made.
        tokens: What the step tokens made.
        model: The tuned weights, numbers of every step and sample sheets (with a volume: a descriptor of the weights). Of an
            experiment on a volume instead: that it failed.
        curves: Reward, cross-entropy and entropy while tuning, and the sample sheets.
        metrics: Reward, cross-entropy and entropy on held-out images before the first step and after the last.
    """
    from vapi.cluster import pages, step

    made = step.attempt("tune", plan, work_dir, model.path, subset=subset.path, tokens=tokens.path)
    if made is None:
        return
    step.write(pages.tuning(made), curves.path)
    for name, value in pages.tuning_metrics(made).items():
        metrics.log_metric(name, value)
