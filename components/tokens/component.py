"""Run the frozen tokenizer over the subset, once."""

from kfp.dsl import Dataset, Input, Markdown, Output

from components import component


@component
def tokens(plan: dict, work_dir: str, subset: Input[Dataset], tokens: Output[Dataset], summary: Output[Markdown]) -> None:
    """Encode the subset's images with the frozen tokenizer; with a volume, no image is ever encoded twice.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted; empty without one.
        subset: What the step subset made.
        tokens: Codes of every image, and the index that says whose they are (with a volume: a descriptor of them).
        summary: How much of the codebook is in use, and how well decoded codes match the images.
    """
    from vapi.cluster import pages, step

    made = step.run("tokens", plan, work_dir, tokens.path, subset=subset.path)
    step.write(pages.tokens(made), summary.path)
