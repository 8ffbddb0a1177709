"""Say whether an experiment's table is whole."""

from components import component


@component
def verdict(failed: list) -> None:
    """End the run as failed if a row of its table is. Kubeflow shows nothing that a failed box made, so it is not the table's own.

    Args:
        failed: Runs that failed, as the step collect found them.
    """
    from vapi.cluster.experiment import verdict

    verdict(failed)
