"""Find what would go wrong before any GPU is asked for, and make plans for the runs of an experiment."""

from kfp.dsl import Artifact, Markdown, Output

from components import component


@component
def expand(
    cluster: dict,
    work_dir: str,
    experiment_name: str,
    experiment_recipe: str,
    experiment_seeds: list,
    data_uri: str,
    data_revision: str,
    tokens_gpus: str,
    tune_gpus: str,
    evaluate_gpus: str,
    track_experiment: str,
    track_uri: str,
    overrides: dict,
    cluster_image: str,
    cluster_node_selector: dict,
    cluster_tolerations: list,
    cluster_volume: str,
    table: Output[Artifact],
    tree: Output[Artifact],
    checks: Output[Markdown],
) -> list:
    """Check the filled form and all that its runs need, as preflight does; make plans for the stages, one where runs share a stage.

    Args:
        cluster: The facts of cluster.yaml that the package was compiled with.
        work_dir: Folder in which the volume is mounted; empty without one.
        table: The experiment, its configuration, and which run each row's numbers come from.
        tree: The plans of all stages, for the steps branches.
        checks: What was looked at, what was found, and what to do about it.

    Returns:
        A branch for each choice of images: plans of the stages subset and tokens, and under at where it is in the tree. There it has
        a branch for each model that is tuned on them, which has one for each evaluation of that model.
    """
    form = dict(locals())
    from vapi.cluster.experiment import expand

    given = {name: form.pop(name) for name in ("cluster", "work_dir")}
    written = {name: form.pop(name).path for name in ("table", "tree")}
    return expand(**given, **written, report=form.pop("checks").path, form=form)
