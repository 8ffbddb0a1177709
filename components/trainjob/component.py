"""Fine-tune the generator with VA-pi on several nodes, in a TrainJob."""

from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output

from components import component


@component
def trainjob(
    plan: dict,
    work_dir: str,
    cluster: dict,
    environment: dict,
    tune_gpus: str,
    tune_nodes: int,
    cluster_image: str,
    cluster_node_selector: dict,
    cluster_tolerations: list,
    cluster_volume: str,
    subset: Input[Dataset],
    tokens: Input[Dataset],
    model: Output[Model],
    curves: Output[HTML],
    metrics: Output[Metrics],
) -> None:
    """Fine-tune the generator in a TrainJob of Kubeflow Trainer v2; this step makes it, shows its log, and ends as it ends.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted, here and on the job's nodes.
        cluster: The facts of cluster.yaml that the package was compiled with.
        environment: Variables for the job's pods, with nothing secret in them.
        subset: What the step subset made.
        tokens: What the step tokens made.
        model: The tuned weights, numbers of every step and sample sheets (a descriptor of the weights).
        curves: Reward, cross-entropy and entropy while tuning, and the sample sheets.
        metrics: Reward, cross-entropy and entropy on held-out images before the first step and after the last.
    """
    from vapi.cluster import pages, step, trainjob

    size = trainjob.Size(tune_nodes, int(tune_gpus), cluster_image, cluster_node_selector, cluster_tolerations, cluster_volume)
    launch = trainjob.launcher(cluster, environment, size)
    made = step.run("tune", plan, work_dir, model.path, launch, subset=subset.path, tokens=tokens.path)
    step.write(pages.tuning(made), curves.path)
    for name, value in pages.tuning_metrics(made).items():
        metrics.log_metric(name, value)
