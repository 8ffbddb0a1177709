"""Find what would go wrong before eight GPUs are asked for, and make a plan for each stage."""

from typing import NamedTuple

from kfp.dsl import Markdown, Output

from components import component


@component
def preflight(
    recipe: dict,
    cluster: dict,
    work_dir: str,
    trainjob: bool,
    data_uri: str,
    data_revision: str,
    model_generator: str,
    model_text_encoder: str,
    model_tokenizer: str,
    subset_source: str,
    subset_images: int,
    subset_seed: int,
    tokens_gpus: str,
    tune_gpus: str,
    tune_nodes: int,
    tune_steps: int,
    tune_images_per_step: int,
    tune_images_per_forward: int,
    tune_group_size: int,
    tune_lr: float,
    tune_policy_weight: float,
    tune_prior_weight: float,
    tune_context_noise: float,
    tune_rewards: dict,
    tune_policy_dropout: str,
    tune_seed: int,
    tune_checkpoint_every: int,
    evaluate_gpus: str,
    evaluate_protocol: str,
    evaluate_samples: int,
    evaluate_seeds: list,
    evaluate_temperature: float,
    evaluate_guidance: float,
    evaluate_guided: float,
    evaluate_reference: str,
    evaluate_validation: str,
    evaluate_prompts: str,
    evaluate_images_per_prompt: int,
    evaluate_detector: str,
    evaluate_clip: str,
    register_model_name: str,
    register_min_fid_drop: float,
    register_min_geneval_gain: float,
    track_experiment: str,
    track_uri: str,
    overrides: dict,
    cluster_image: str,
    cluster_node_selector: dict,
    cluster_tolerations: list,
    cluster_volume: str,
    checks: Output[Markdown],
) -> NamedTuple("Plans", [("subset", dict), ("tokens", dict), ("tune", dict), ("evaluate", dict), ("register", dict)]):  # type: ignore
    """Check the filled form, data, weights, volume, nodes, secrets, image and MLflow; make a plan for each stage.

    Args:
        recipe: The recipe's whole configuration, which the other fields change.
        cluster: The facts of cluster.yaml that the package was compiled with.
        work_dir: Folder in which the volume is mounted; empty without one.
        trainjob: Whether tune runs on several nodes.
        checks: What was looked at, what was found, and what to do about it.

    Returns:
        The plan of each stage: its configuration, and digests of the data and the code that its result follows from.
    """
    form = dict(locals())
    from collections import namedtuple

    from vapi.cluster.preflight import preflight

    given = {name: form.pop(name) for name in ("recipe", "cluster", "work_dir", "trainjob")}
    plans = preflight(**given, report=form.pop("checks").path, form=form)
    return namedtuple("Plans", plans)(**plans)
