"""How writes are marked while they happen: in memory-mapped bits that outlive the process, and in an intent log.

The log outlives a power loss. `marking.h` has the protocol, and `kernel` marks by it in Python; `arena` has the memory
of the bits. `recorder` runs a session, `tracker` is what tools call, and `home` is the store's namespace that they
feed. `marker` marks from other processes, and `gate` stops all writes for an instant. `dirtmap.engine.session` reads
what a tracker has left.
"""
