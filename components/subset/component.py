"""Pick images from a source and validate them."""

from kfp.dsl import HTML, Dataset, Output

from components import component


@component
def subset(plan: dict, work_dir: str, subset: Output[Dataset], quality: Output[HTML]) -> None:
    """Pick images by seed, keep their bytes, and check them with Great Expectations.

    Args:
        plan: Configuration, data and code, as preflight resolved them.
        work_dir: Folder in which the volume is mounted; empty without one.
        subset: Parquet shards, manifest and data-quality report (with a volume: a descriptor of them).
        quality: The data-quality report: what was checked, how it came out, and some of the images.
    """
    from vapi.cluster import step

    made = step.run("subset", plan, work_dir, subset.path)
    step.show(made / "quality.html", quality.path)
