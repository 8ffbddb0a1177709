"""Read what a loop within a loop goes over."""

from kfp.dsl import Artifact, Input

from components import component


@component
def branches(tree: Input[Artifact], at: str) -> list:
    """Read the branches of a branch from the tree of an experiment's plans.

    A loop over a field of another loop's item is a loop that Kubeflow cannot run (read in its driver, 2.17), so inner loops go over
    what this step returns. It is told where to look, and not the branches: they are more than a command line holds.

    Args:
        tree: What the step expand wrote: the plans of all stages.
        at: Where the branch is in the tree.

    Returns:
        A branch for each choice that is made there: plans of its stages, and under at where it is itself.
    """
    from vapi.cluster.experiment import opened

    return opened(tree.path, at)
