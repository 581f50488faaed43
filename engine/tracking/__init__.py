"""How writes are marked while they happen: in memory-mapped bits that outlive the process, and in an intent log.

The log outlives a power loss. `kernel` marks, `recorder` runs a session, `tracker` is what tools call, and `home` is
the store's namespace that they feed. `dirtmap.engine.session` reads what a tracker has left.
"""
