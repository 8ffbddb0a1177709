"""The stages as Kubeflow pipelines: ``python -m pipelines compile | check | run-local | submit | schedule``.

``pipeline`` is the graph, ``experiment`` that of a whole table of runs, ``resources`` what its boxes ask of a cluster, ``packages``
the compiled files, ``fields`` a filled form, ``local`` runs one here, ``server`` talks to Kubeflow, ``registry`` to the image's,
``worktree`` reads a run's values from the clone, ``manifests`` are applied once. What happens inside a box is in ``vapi.cluster``;
the cluster's facts are in ``cluster.yaml``.
"""
