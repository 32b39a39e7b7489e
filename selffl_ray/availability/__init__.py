"""When clients can be asked: one law a file, registered by name.

A law's factory is called with its options, the seed, the clients' names and the number of rounds,
and gives (M, R) bool: whether a client is there in a round. Every client draws from a stream of its
own, so a law does not depend on who else there is, and a longer run begins like a shorter one.
"""
