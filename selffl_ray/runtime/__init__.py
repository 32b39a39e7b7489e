"""Ray: placement of actors, client and driver actors, the transport between them.

Ray reads some settings when it is imported, so they are made before any module here imports it.
"""

from selffl_ray.importing import uncollected
from selffl_ray.local_ray import quiet_ray

# In a client actor this is the first import of torch.
with uncollected():
    import torch  # noqa: F401

quiet_ray()
