"""The five stages as a Kubeflow pipeline: ``python -m pipelines compile | check | run-local | submit | schedule | manifests``.

``pipeline`` is the graph, ``resources`` what its boxes ask of a cluster, ``packages`` the compiled files, ``local`` runs one
here, ``server`` talks to Kubeflow, ``source`` reads a run's values from the clone. What happens inside a box is in
``vapi.cluster``; the cluster's facts are in ``cluster.yaml``.
"""
