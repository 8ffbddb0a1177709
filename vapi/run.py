"""What a stage says about itself while it works. Where that goes is ``vapi.track``'s business."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


class Run:
    """Where a stage reports to. This one keeps nothing: tracking is off, or we are not rank 0."""

    def params(self, values: dict[str, Any]) -> None:
        """Parameters beyond the configuration, which is there already."""

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers at a step; without one they are final and belong to the whole execution too."""

    def image(self, key: str, image: Image | Path | str, step: int | None = None) -> None:
        """A picture (PIL, or the path of a PNG) for MLflow's image grid; final without a step."""

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """A file or folder, copied now and kept beside the run."""

    def dataset(self, name: str, digest: str, source: Path | str) -> None:
        """The data that the run read. MLflow keeps 36 characters of the digest."""

    def tag(self, key: str, value: str) -> None:
        """A word about the run."""

    def server(self) -> Server | None:
        """MLflow itself, after everything so far has arrived there; None if tracking is off.

        For the stage that cannot do without. Raises ValueError when the server cannot be reached.
        """
        return None


NO_RUN = Run()


@dataclass(frozen=True)
class Server:
    """A reachable MLflow: the module, a client, the ids of this stage's run and its parent ("": none)."""

    mlflow: Any
    client: Any
    uri: str
    run: str
    parent: str
    lineage: dict[str, str]  # execution, data, git
