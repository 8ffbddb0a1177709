"""Register the tuned model if it passes the gates."""

from kfp.dsl import Artifact, Input, Markdown, Model, Output

from components import component


@component
def register(
    plan: dict,
    work_dir: str,
    model: Input[Model],
    evaluation: Input[Artifact],
    registration: Output[Artifact],
    verdict: Output[Markdown],
) -> None:
    """Judge the tuned model by its gates, and put it into MLflow's registry if it passes them.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted; empty without one.
        model: What the step tune made.
        evaluation: What the step evaluate made.
        registration: Each gate, and the version that was made.
        verdict: The same to read, with a link to the version in the registry.
    """
    from vapi.cluster import pages, step

    made = step.run("register", plan, work_dir, registration.path, tune=model.path, evaluate=evaluation.path)
    step.write(pages.registration(made), verdict.path)
