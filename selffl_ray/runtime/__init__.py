"""Ray: placement of actors, client and driver actors, the transport between them."""
