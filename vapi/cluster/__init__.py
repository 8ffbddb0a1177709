"""Everything that only a run on a cluster needs; the stages know nothing of it.

Data flows one way: the run form (``form``) and the facts about the cluster (``config``) go through ``preflight``, which makes a
plan for each stage; a ``step`` carries out its plan with the command that a terminal would type, on data from its
``origin``, and ``pages`` show what came of it. ``trainjob`` runs a step on several nodes. Kubernetes itself is asked
in ``api`` alone.
"""
