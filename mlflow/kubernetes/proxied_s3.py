"""The store s3:// of the tracking server, without its invitation to go there directly.

With S3 behind it, a server of MLflow 3.17 tells clients and browsers to move files between themselves and the store, by
addresses that it signs for them: every download, and uploads from 500 MB on. It has no option against that, and here nobody
but the server reaches the store, or finds its name. It offers this when the store has the methods for it, so this one has
them not. MLflow loads it as it loads plugins, by entry_points.txt beside it.
"""

from __future__ import annotations

from mlflow.entities import FileInfo
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository


class ProxiedS3(ArtifactRepository):
    """MLflow's own S3 store, less MultipartUploadMixin, MultipartDownloadMixin and PresignedUploadMixin."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        self.store = S3ArtifactRepository(artifact_uri, tracking_uri=tracking_uri, registry_uri=registry_uri)

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        self.store.log_artifact(local_file, artifact_path)

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        self.store.log_artifacts(local_dir, artifact_path)

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        return self.store.list_artifacts(path)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        self.store._download_file(remote_file_path, local_path)

    def delete_artifacts(self, artifact_path: str | None = None) -> None:
        self.store.delete_artifacts(artifact_path)
