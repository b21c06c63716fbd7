"""Files that survive a crash: the protocol, the choice of what to go on from, and the wish to stop."""
