"""The boxes of the graph: one folder each, with a signature and a few lines that call ``vapi``.

A component is shipped as the text of its function, so a body imports what it needs and uses nothing around it. All run in
one image that holds everything, and install nothing.
"""

import functools

from kfp import dsl

from vapi.cluster.config import ImageConfig

component = functools.partial(dsl.component, base_image=ImageConfig().name, install_kfp_package=False)
"""Makes a component; the pipeline's field cluster_image says which image runs it."""
